__version__ = "0.1.0"

from . import console as console  # takes over Ctrl-C before a command imports anything slow
