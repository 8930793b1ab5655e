"""main.py that evaluates the mean of the weights over all steps so far: averaging.py FLAGS...

As in NT-ASGD after its trigger, but from the first step and with any optimizer. Run from the top of
the checkout.
"""

import sys

sys.path.insert(0, ".")

import flags
import main
import train

make = train.Trainer.__init__


def make_averaging(self, params, *rest, **more):
    make(self, params, *rest, **more)
    self.average = train.Average(params)


train.Trainer.__init__ = make_averaging
flags.run_command(lambda: main.main(sys.argv[1:]))
