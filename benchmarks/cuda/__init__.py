"""``llcompile bench operator --device cuda``: ours against peers and against the roofline, side by side in one run.

Files in the order in which a run goes through them: ``cases`` (what is measured, most telling first), ``peers`` and
``ours`` (who is measured), ``warm`` (compile ahead), ``crew`` and ``worker`` (one case in another process),
``operands``, ``timing``, ``chip`` (how), ``roofline`` (what is possible), ``budget`` (until when), ``goals``, ``show``
and ``plot`` (what it says).
"""
