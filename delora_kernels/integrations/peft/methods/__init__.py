"""Methods of this library as methods of PEFT.

register.py   puts a method into PEFT's tables
base.py       what their layers share
goat/ ether/  config, tuner and layer of each
"""
