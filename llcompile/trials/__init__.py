"""Trials: train one model as it is and converted, on the same batches, and say whether the conversion pays."""
