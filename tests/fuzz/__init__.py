"""Programs made up at random: mixers as people may write, hold and call them, and things that only look like one.

    python -m tests.fuzz                        50 programs of a fresh seed; failing ones are written to /tmp
    LLCOMPILE_FUZZ_SEED=7 python -m tests.fuzz 300

`recipes` has the tables that a program is put together from, `program` writes it, and `check` (which is part of every
program) runs it as written and converted. A program is a text, so that a failing one can be printed.
"""
