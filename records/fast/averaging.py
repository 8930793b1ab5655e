"""main.py, but it evaluates and saves the mean of the weights over all steps: averaging.py FLAGS...

As in NT-ASGD after its trigger, but from the first step and with any optimizer. Run from the top of
the checkout.
"""

import sys

sys.path.insert(0, ".")

import flags
import main
import train

original_init = train.Trainer.__init__


def init_with_average(self, params, *rest, **more):
    original_init(self, params, *rest, **more)
    self.average = train.Average(params)


train.Trainer.__init__ = init_with_average
flags.run_command(lambda: main.main(sys.argv[1:]))
