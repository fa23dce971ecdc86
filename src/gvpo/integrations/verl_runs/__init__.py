"""Starting verl: its options checked before anything loads, and those that a config of this library stands for.

options   a config as options of `python -m verl.trainer.main_ppo`; imports nothing of verl
reward    this library's reward functions, called by verl
dry_run   options composed and checked against the verl that is installed
"""
