"""Loads the emulated ops into this process and those that it starts: Python imports a module of this name when it starts."""

import emulated

emulated.take_the_place_of_the_library()
