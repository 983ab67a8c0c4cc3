"""Faults at full count: kills, full disks, too little memory, damaged inputs, and the same bytes twice.

`python -m faults --kills 100 --mutations 10000 --seed 1` (`make faults`); tests/test_faults.py runs a few of each.
Nothing in the product knows of these: they act from outside, on forked processes that have imported everything.
"""
