"""Loads the emulated ops into this process and those that it starts: Python imports this module when it starts."""

import emulated

emulated.take_the_place_of_the_library()
