"""Recipes: what sets the flags that are not given, as plain data.

A flag that is given always wins. See records/short for the search behind the short recipe.
"""

from data import InputError
from flags import spelled
from schedule import SCHEDULES
from train import OPTIMIZERS

# In a short run the regularizers are what costs, in a long one they are what pays: they begin at a
# share of their strength, and would have all of it after so many epochs.
WHOLE_AFTER = 12
RECIPES = {
    "published": {},
    "short": {
        "optimizer": "adamw", "lr": 8e-3, "wdecay": 0.1, "schedule": "onecycle",
        "decoder_bias": "unigram", "batch_size": 20, "regularization_ramp": [0.3, WHOLE_AFTER],
    },
}


def recipe(name, epochs):
    """What the recipe sets in a run of `epochs`: {flag's name in the namespace: value}."""
    settings = dict(RECIPES[name])
    if "regularization_ramp" in settings:  # of which the flag wants parts of the run
        share, whole_after = settings["regularization_ramp"]
        settings["regularization_ramp"] = [share, float(f"{whole_after / epochs:.4g}")]
    return settings


def follow(given):
    """What --recipe sets of the flags that are not `given`, as defaults. Raises InputError.

    `by_recipe` among them names these flags: a run that is resumed cannot tell otherwise.
    """
    name = getattr(given, "recipe", "published")
    if RECIPES[name] and not hasattr(given, "epochs"):
        raise InputError(f"--recipe {name}: is made for a number of epochs; give --epochs")
    settings = recipe(name, getattr(given, "epochs", 1))
    if getattr(given, "optimizer", None) not in (None, settings.get("optimizer")):
        for flag in ("lr", "wdecay"):  # which are not for any optimizer
            settings.pop(flag, None)
    settings = {flag: value for flag, value in settings.items() if not hasattr(given, flag)}
    return {**settings, "by_recipe": list(settings)}


def stretch(given, inherited):
    """What the recipe of a run that is resumed sets for the --epochs that are `given`.

    Raises LookupError, TypeError or ValueError for flags, `inherited` from a state, that none are.
    """
    OPTIMIZERS[inherited["optimizer"]], SCHEDULES.index(inherited["schedule"])
    ramp = inherited["regularization_ramp"]
    if ramp is not None and list(map(type, ramp)) != [float, float]:
        raise TypeError("regularization_ramp")
    epochs = getattr(given, "epochs", inherited["epochs"])
    before, after = (recipe(inherited["recipe"], n) for n in (inherited["epochs"], epochs))
    mine = [flag for flag in inherited["by_recipe"] if not hasattr(given, flag)]
    stretched = {flag: after[flag] for flag in mine if after[flag] != before[flag]}
    return {**stretched, "by_recipe": mine}


def describe(args):
    """A log line: what the recipe has set in a new run with the flags `args`; "" if nothing."""
    settings = recipe(args.recipe, args.epochs)
    found = [spelled(flag, settings[flag]) for flag in args.by_recipe]
    return f"Recipe {args.recipe} for --epochs {args.epochs}: {' '.join(found)}" if found else ""
