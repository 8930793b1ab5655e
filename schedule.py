"""What changes while a run goes on: the one-cycle learning rate, the regularizers' ramp.

Both are functions of the progress of a run, the share of its epochs that it has read. So they
follow the text, whatever the windows' lengths, and a run that is resumed needs nothing but its
position to go on exactly.
"""

import math
from argparse import Namespace

from model import RATES
from weight_drop import WeightDrop

SCHEDULES = ("constant", "onecycle")
UP = 0.1  # the share of a run over which one cycle's rate rises
FIRST, LAST = 1 / 25, 1 / 250_000  # one cycle's first and last rate, of its highest
REGULARIZERS = (*RATES, "alpha", "beta")  # those two of AR and TAR


def rate_share(schedule, progress):
    """The learning rate at `progress`, in [0, 1], as a share of the highest, which is --lr.

    onecycle (Smith and Topin 2017, 1708.07120): half a cosine wave from FIRST up to 1 over UP of
    the run, and another from there down to LAST. torch's OneCycleLR with pct_start=UP has the same
    two waves, but counts steps, whose number random windows do not tell beforehand.
    """
    if schedule == "constant":
        return 1.0
    if progress < UP:
        return between(FIRST, 1.0, progress / UP)
    return between(1.0, LAST, min(1.0, (progress - UP) / (1 - UP)))


def between(first, last, share):
    """Half a cosine wave from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def ramp(progress, share, part):
    """The regularizers' strength: linear from `share` to 1 over `part` of the run, then 1.

    With a `part` above 1 the run ends before it comes to the whole.
    """
    return min(1.0, share + (1 - share) * progress / part)


def strengths(args, progress):
    """{flag: value} of dropouts, weight drop, AR and TAR at `progress`, of `args` with a ramp."""
    strength = ramp(progress, *args.regularization_ramp)
    return {name: strength * getattr(args, name) for name in REGULARIZERS}


def at(progress, args, model):
    """The flags of a step at `progress`, and its share of the learning rate.

    With a ramp every dropout, weight drop, AR and TAR have their strength of the moment; the
    dropouts' rates are those of `model`, an RNNModel, from then on.
    """
    share = rate_share(args.schedule, progress)
    if not args.regularization_ramp:
        return args, share
    rates = strengths(args, progress)
    for name in RATES:
        setattr(model, name, rates[name])
    for module in model.modules():
        if isinstance(module, WeightDrop):
            module.dropout = rates["wdrop"]
    return Namespace(**{**vars(args), **rates}), share
