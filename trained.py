"""A trained model, ready for use: what pointer.py, generate.py and evaluate.py share."""

from collections import Counter

from data import Dictionary, InputError
from flags import device, rnn_type, settle_device
from model import NOTES
from run import set_up_device
from utils import build, read_checkpoint, warn

UNK = "<unk>"


def add_flags(parser):
    """Adds the flags that say where a model runs, and of which type it has to be."""
    add = parser.add_argument
    add("--model", type=rnn_type, help="the checkpoint's type, which is checked (default: any)")
    add("--cuda", action="store_true", help="require CUDA (otherwise used where there is one)")
    add("--device", type=device, help="cpu, cuda, cuda:N or mps (default: cuda or cpu)")


def load_for_use(path, args, keep_bilm=False):
    """Loads the checkpoint at `path` on `args.device`, by default CUDA where there is one.

    Returns (nn.ModuleList([model, criterion]) in evaluation mode and float32, data.Dictionary).
    Unless `keep_bilm`, a biLM becomes its forward language model, with a note on stderr. Raises
    InputError for a flag that cannot be met, and for biLSTM, which reads the word it predicts.
    """
    settle_device(args)
    args.precision = "fp32"
    set_up_device(args)
    checkpoint = read_checkpoint(path, args.device)
    params = build(checkpoint, path).eval()
    found = params[0].rnn_type
    if args.model not in (None, found):
        raise InputError(f"--model {args.model}: {path} holds a model {found}; leave the flag out")
    if found == "biLSTM":
        raise InputError(f"{path}: {NOTES[found]}; name another model")
    if found == "biLM" and not keep_bilm:
        params[0] = params[0].forward_half()
        cloze = checkpoint["flags"].get("objective") == "cloze"
        warn(
            f"Note: of the biLM {path}, its forward language model alone is used"
            + (", which was not trained: it was for cloze prediction" if cloze else "")
        )
    return params, Dictionary(checkpoint["vocabulary"])


def encode(words, dictionary, path):
    """Returns (ids of `words`, Counter of the words outside the vocabulary, which become <unk>).

    Raises InputError, naming some of them and the checkpoint's `path`, if there is no <unk>.
    """
    ids = dictionary.word2idx
    unknown = Counter(word for word in words if word not in ids)
    if unknown and UNK not in ids:
        raise InputError(
            f"{path}: its vocabulary has no {UNK}, and lacks {name_commonest(unknown)}; "
            "leave them out"
        )
    return [ids[UNK if word in unknown else word] for word in words], unknown


def name_commonest(words, most=5):
    """The `most` commonest of a Counter of words, quoted, for a message."""
    named = ", ".join(repr(word) for word, _ in words.most_common(most))
    return named + (f" and {len(words) - most} others" if len(words) > most else "")


def warn_of_unknown(unknown):
    """Names the words that `encode` did not find, on stderr."""
    if unknown:
        warn(f"Warning: not in the vocabulary, read as {UNK}: {name_commonest(unknown)}")
