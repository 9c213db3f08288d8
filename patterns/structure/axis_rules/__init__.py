"""Axis rules: what each ATen operation does to axes. An unknown one starts new axes and mixes all.

A rule gives the axes of the results and notes which axes it *mixes*: those along which a result depends on more than
the same position of its operands.
"""
