"""A trained model, ready for use: what pointer.py, generate.py and evaluate.py share."""

from collections import Counter

from data import EOS, Dictionary, InputError
from flags import device, resolve_device, rnn_type
from model import NOTES
from checkpoint import build_params, read_checkpoint
from utils import set_up_device, warn

UNK = "<unk>"


def add_flags(parser):
    """The flags that say where a model runs, and of which type it has to be."""
    add = parser.add_argument
    add("--model", type=rnn_type, help="the checkpoint's type, which is checked (default: any)")
    add("--cuda", action="store_true", help="require CUDA (otherwise used where there is one)")
    add("--device", type=device, help="cpu, cuda, cuda:N or mps (default: cuda or cpu)")


def trained(path, args, both=False):
    """nn.ModuleList([model, criterion]) of the checkpoint at `path`, in evaluation mode, float32.

    On `args.device`, or on CUDA where there is one. Returns also the checkpoint's dictionary of
    words. A biLM is its forward half, an LSTM, and a warning says so, unless the caller has a use
    for `both`. Raises InputError for a flag that cannot be met, and for biLSTM, which has no use:
    it wants to read the answer.
    """
    resolve_device(args)
    args.precision = "fp32"
    set_up_device(args)
    checkpoint = read_checkpoint(path, args.device)
    params = build_params(checkpoint, path).eval()
    found = params[0].rnn_type
    if args.model not in (None, found):
        raise InputError(f"--model {args.model}: {path} holds a model {found}; leave the flag out")
    if EOS not in checkpoint["vocabulary"]:
        raise InputError(f"{path}: its vocabulary has no {EOS}; train again")
    if not all(weight.isfinite().all() for weight in params.parameters()):
        raise InputError(f"{path}: its weights are not all finite; train again")
    if found == "biLSTM":
        raise InputError(f"{path}: {NOTES[found]}; name another model")
    if found == "biLM" and not both:
        params[0] = params[0].forward_half()
        cloze = checkpoint["flags"].get("objective") == "cloze"
        warn(
            f"Note: of the biLM {path}, its forward language model alone is used"
            + (", which was not trained: it was for cloze prediction" if cloze else "")
        )
    return params, Dictionary(checkpoint["vocabulary"])


def encode(words, dictionary, path):
    """Ids of `words`, and a Counter of those that the vocabulary of `path` lacks, read as <unk>.

    Raises InputError, naming some of those, where the vocabulary has no <unk>.
    """
    unknown = Counter(word for word in words if word not in dictionary.word2idx)
    if unknown and UNK not in dictionary.word2idx:
        raise InputError(
            f"{path}: its vocabulary has no {UNK}, and lacks {some(unknown)}; leave them out"
        )
    default = dictionary.word2idx.get(UNK)
    return [dictionary.word2idx.get(word, default) for word in words], unknown


def some(unknown, most=5):
    """The commonest of a Counter of words, for a message."""
    named = ", ".join(repr(word) for word, _ in unknown.most_common(most))
    return named + (f" and {len(unknown) - most} others" if len(unknown) > most else "")


def begin_of_text(dictionary):
    """The id of what stands before a text's first word: the end of the sentence before."""
    return dictionary.word2idx[EOS]


def warn_of_unknown(unknown):
    if unknown:
        warn(f"Warning: not in the vocabulary, read as {UNK}: {some(unknown)}")
