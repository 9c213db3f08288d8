"""What `make check` leaves out: tests that take a second or more, start a program or trace a model of a library.

Tests that use `fresh_dynamo` or `warm_dynamo` compile something and are left out as well; everything else, new tests
included, is in `make check`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

FOLDER = Path(__file__).parent
COMPILING = {"fresh_dynamo", "warm_dynamo"}
LONG_FOLDERS = {"models", "fuzz"}
LONG_FILES = {
    "kernels/test_triton_interpreter.py",
    "patterns/test_identify_attention.py",
    "patterns/test_identify_recurrences.py",
    "patterns/test_regions.py",
    "test_bench.py",
    "test_calls_differ.py",
    "test_distributed.py",
    "test_export.py",
    "test_forget.py",
    "test_fresh.py",
    "test_processes.py",
    "test_transaction.py",
    "test_verify.py",
}
LONG_TESTS = {
    "kernels/test_operator.py": ("test_error_budget", "test_gradcheck", "test_strong_decays"),
    "kernels/test_torch_operators.py": ("test_compiled_once_for_all_lengths", "test_opcheck"),
    "kernels/test_triton_sources.py": (
        "test_every_source_is_python_that_names_what_it_uses",
        "test_every_parameter_is_used",
        "test_packed_rows_have_homes",
        "test_triton_is_optional",
    ),
    "patterns/test_reasons.py": (
        "test_each_kind_has_its_code",
        "test_a_report_shows_codes",
        "test_a_page_and_a_look_have_the_code",
    ),
    "spellings/test_corpus.py": ("test_spelling_is_of_its_family", "test_twin_differs"),
    "test_bench_cuda.py": ("test_worker_measures_ours",),
    "test_cli.py": ("test_config_folder", "test_model_type", "test_everything_that_can_be_written", "test_doctor"),
    "test_demo.py": (
        "test_a_conversion_that_does_nothing_stops_the_demo",
        "test_a_model_of_the_tour_acts",
        "test_a_model_of_the_tour_that_does_not_act_stops_the_demo",
    ),
    "test_docs.py": ("test_the_code_of_a_page_prints_what_the_page_shows",),
    "test_kernels_command.py": ("test_who_reads_may_stop",),
    "test_level_weights.py": ("test_lives_in_a_transformers_model", "test_start_is_exactly_one_through_inductor"),
    "test_look.py": ("test_the_decisions_are_those_of_the_real_run",),
    "test_package.py": ("test_wheel_holds_every_file", "test_wheel_installs_and_works"),
    "test_readme.py": ("test_example_runs",),
    "test_repro.py": ("test_the_file_runs_by_itself",),
    "test_serving_tools.py": ("test_the_command_writes_what_it_shows",),
    "test_versions.py": ("test_a_newer_release_is_named_once", "test_tested_releases_are_not_spoken_of"),
}


def is_long(file: Path, function: str, fixtures: Collection[str]) -> bool:
    """Whether `make check` leaves this test out."""
    name = file.relative_to(FOLDER).as_posix() if file.is_relative_to(FOLDER) else file.name
    return (
        not COMPILING.isdisjoint(fixtures)
        or name.split("/")[0] in LONG_FOLDERS
        or name in LONG_FILES
        or function in LONG_TESTS.get(name, ())
    )
