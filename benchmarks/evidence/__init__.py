"""Does it pay to convert a trained model? Three experiments, whose results docs/evidence.md shows.

    python -m benchmarks.evidence recall --out DIR --minutes 8 --workers 10 --device cuda
    python -m benchmarks.evidence typeseg --out DIR ...
    python -m benchmarks.evidence language --out DIR ...
    python -m benchmarks.evidence show --out DIR

`recall` is multi-query associative recall as zoology has it, `typeseg` a Mamba-1 that others have trained, `language`
byte-level models that are trained here, then frozen. Each runs in several processes, stops by itself, writes what it
has found after each training, and goes on from there when it is started again. `--small` takes sizes for two cores.
`show` writes the tables and the plots.
"""
