"""A Mamba-1 that others have trained, converted: the labels of typeseg 0.2.7 in torch.

    pip install typeseg          # or: export TYPESEG_WHEEL=typeseg-0.2.7-py3-none-any.whl
    python -m typeseg_torch FILE

typeseg (Apache-2.0, Martin Dallinger) gives each character of a text one of 35 content types. Its six layers scan the
text forwards and backwards. The code here is our own; the weights are read from the installed package or its wheel.
"""
