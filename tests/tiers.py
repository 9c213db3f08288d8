"""What `make check` and `make test` leave out.

`make check`: tests that take a second or more, start a program or trace a model of a library.

Tests that use `fresh_dynamo` or `warm_dynamo` compile something and are left out as well; everything else, new tests
included, is in `make check`.

`make test`: tests marked as slow, and the cases of SECOND_CASES: each takes seconds, and another one of its test, or of
the file that is named beside it, tries the same.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

FOLDER = Path(__file__).parent
COMPILING = {"fresh_dynamo", "warm_dynamo"}
LONG_FOLDERS = {"models", "fuzz"}
LONG_FILES = {
    "kernels/test_cost.py",
    "kernels/test_triton_interpreter.py",
    "patterns/test_identify_attention.py",
    "patterns/test_identify_recurrences.py",
    "patterns/test_regions.py",
    "test_bench.py",
    "test_bench_operator.py",
    "test_calls_differ.py",
    "test_distributed.py",
    "test_export.py",
    "test_forget.py",
    "test_fresh.py",
    "test_look_layers.py",
    "test_page.py",
    "test_processes.py",
    "test_transaction.py",
    "test_verify.py",
    "trials/test_command.py",
    "trials/test_costs.py",  # compiles kernels when they are not on disk
    "trials/test_planted.py",
    "trials/test_trial.py",
}
LONG_TESTS = {
    "distributed/test_pipeline.py": ("test_stages_are_one_process", "test_the_example_runs"),
    "distributed/test_wrappers.py": (
        "test_trained_as_on_one_process",
        "test_wrapped_too_early",
        "test_flat_parameters",
    ),
    "distributed/test_context_parallel.py": ("test_is_the_whole_sequence", "test_the_example_runs"),
    "distributed/test_tensor_parallel.py": ("test_dtensors_over_batch_and_heads",),
    "kernels/test_choice.py": ("test_a_machine_without_a_compiler",),
    "kernels/test_cpp_build.py": (
        "test_what_the_sources_include_is_found",
        "test_a_fork_while_another_thread_compiles",
        "test_two_processes_at_once",
    ),
    "kernels/test_cpp_scan.py": ("test_nothing_is_as_large_as_decays_per_channel",),
    "kernels/test_operator.py": ("test_error_budget", "test_gradcheck", "test_strong_decays"),
    "kernels/test_torch_operators.py": ("test_compiled_once_for_all_lengths", "test_opcheck"),
    "kernels/test_triton_compile.py": ("test_rates", "test_erase_keys"),
    "kernels/test_triton_sources.py": (
        "test_every_source_is_python_that_names_what_it_uses",
        "test_every_parameter_is_used",
        "test_packed_sequences_have_their_own_chunks",
        "test_buffers_are_as_signatures_say",
        "test_buffers_are_written_before_they_are_read",
        "test_triton_is_optional",
    ),
    "patterns/test_reasons.py": (
        "test_each_kind_has_its_code",
        "test_a_report_shows_codes",
        "test_a_page_and_a_look_have_the_code",
    ),
    "spellings/test_corpus.py": ("test_spelling_is_of_its_family", "test_twin_differs"),
    "test_bench_cuda.py": ("test_worker_measures_ours",),
    "test_cli.py": (
        "test_config_folder",
        "test_model_type",
        "test_everything_that_can_be_written",
        "test_doctor",
        "test_doctor_tells_whether_cpp_kernels_can_be_compiled",
    ),
    "test_demo.py": (
        "test_a_conversion_that_does_nothing_stops_the_demo",
        "test_a_model_of_the_tour_acts",
        "test_a_model_of_the_tour_that_does_not_act_stops_the_demo",
    ),
    "test_docs.py": ("test_the_code_of_a_page_prints_what_the_page_shows",),
    "test_evidence.py": (
        "test_processes_end_when_time_is_up",
        "test_show_fills_the_page",
        "test_the_module_is_typesegs",
    ),
    "test_kernels_command.py": ("test_who_reads_may_stop",),
    "test_level_weights.py": ("test_lives_in_a_transformers_model", "test_start_is_exactly_one_through_inductor"),
    "test_look.py": ("test_the_decisions_are_those_of_the_real_run", "test_what_the_compiler_of_this_machine_makes"),
    "test_package.py": ("test_wheel_holds_every_file", "test_wheel_installs_and_works"),
    "test_readme.py": ("test_example_runs",),
    "test_repro.py": ("test_the_file_runs_by_itself",),
    "test_serving_tools.py": ("test_the_command_writes_what_it_shows",),
    "trials/test_passing.py": ("test_models_of_transformers",),
    "trials/test_verdict.py": ("test_the_best_of_equal_arms_does_not_win_by_being_the_best",),
    "test_versions.py": ("test_a_newer_release_is_named_once", "test_tested_releases_are_not_spoken_of"),
}

SECOND_CASES = {
    "fuzz/test_fuzz.py": (
        "test_a_few[0]",
        "test_a_few[122]",
        "test_a_few[183]",
        "test_a_few[244]",
    ),
    "kernels/test_torch_operators.py": (
        "test_opcheck[channel-True-4]",
        "test_opcheck[token-False-4]",
    ),
    "kernels/test_triton_interpreter.py": (
        "test_decode[(None, False)]",
        "test_decode[('channel', False)]",
        "test_half_precision_with_decay_per_channel[True-torch.float16]",
        "test_definition[('channel', False)-None]",
        "test_states[('token', True)-level-9]",
    ),
    "models/test_barriers.py": ("test_inside_of_a_mixer[_window_of_gradients]",),
    "models/test_checkpoint.py": (
        "test_left_out_when_it_was_opened[compile]",
        "test_opened_as_it_was_saved[dtype1]",
    ),
    "models/test_convert.py": (
        "test_converts_and_computes_the_same[kimi_linear]",
        "test_prefill_and_decode[qwen3_5_text-linear]",
        "test_dynamic_length[mamba2]",  # test_backend.py
        "test_trains[olmo_hybrid]",
        "test_prefill_and_decode[mamba2-linear]",  # test_generate.py
        "test_other_sizes[mamba2-0]",  # test_backend.py
    ),
    "models/test_in_place.py": ("test_statements_around_a_mixer[loop_into_a_buffer]",),
    "models/test_loops.py": (
        "test_a_number_that_follows_from_the_batch[keys]",
        "test_one_decay_computed_twice[logsigmoid]",
        "test_one_decay_computed_twice[softplus]",
        "test_two_decays[half of it]",
        "test_two_decays[detached]",
        "test_a_learned_rate_in_a_loop_of_whole_chunks[64]",
        "test_chunks[narrow-cat-12]",
        "test_chunks[narrow-rows written-12]",
        "test_chunks[tensor_split-cat-12]",
        "test_chunks[tensor_split-rows written-12]",
        "test_chunks[unflatten-cat-12]",
        "test_chunks[unflatten-slices written-12]",
    ),
    "models/test_one_token.py": (
        "test_it_is_the_first_token_of_a_longer_call[fading]",
        "test_it_is_the_first_token_of_a_longer_call[steps]",
    ),
    "models/test_packed.py": ("test_forward_and_backward[seq_idx-linear]",),
    "models/test_spellings.py": (
        "test_recognised[loop over 128 tokens]",
        "test_left_alone[associative scan of affine maps, swapped]",
        "test_left_alone[scan, tanh]",
        "test_left_alone[test-time training, momentum]",
        "test_left_alone[loop with a denominator for each token, clipped]",
        "test_missed[associative scan of affine maps]",
        "test_some_layouts_left_alone",
        "test_rewritten[associative scan]",  # test_level_weights[scan]
        "test_rewritten[gated delta, fewer key heads]",
        "test_rewritten[a slice of the past for each query]",
        "test_twin_is_reported[loop with a denominator for each token, clipped]",
        "test_twin_is_reported[associative scan of affine maps, swapped]",
        "test_twin_is_reported[test-time training, momentum]",
        "test_level_weights[chunk loop with its projections]",
        "test_other_lengths[delta by a triangular solve]",
        "test_disguised[delta rule with the wrong sign]",
    ),
    "patterns/test_float_attributes.py": (
        "test_another_number_is_seen[power]",
        "test_another_number_is_seen[scale]",
    ),
    "patterns/test_fixed_numbers.py": ("test_numbers_of_heads_serve_all_lengths[any]",),
    "patterns/test_identify_models.py": (
        "test_models[mamba]",
        "test_models[recurrent_gemma]",
        "test_models[bamba]",
        "test_models[kimi_linear]",
        "test_models[qwen3_next]",  # models/test_convert.py
        "test_attention_in_two_products[mistral]",  # test_a_mask_of_padding_leaves_the_window[eager]
    ),
    "patterns/test_identify_recurrences.py": (
        "test_long_loops_are_read_once[model1-gated linear recurrence (RG-LRU)-256]",
        "test_long_loops_are_read_once[model2-non-linear recurrence (RNN)-100]",
        "test_gated_linear_recurrence[associative]",
        "test_selective_scan[associative]",  # test_its_convolution_is_a_part_of_it
    ),
    "patterns/test_operand_kinds.py": (
        "test_a_learned_state_at_the_start[sum]",
        "test_a_learned_state_at_the_start[delta]",
        "test_a_divisor_of_decays[stabilised]",
        "test_a_number_on_the_diagonal[of each token]",
        "test_a_number_on_the_diagonal[of each head]",
    ),
    "patterns/test_written_operands.py": (
        "test_the_operand_is_what_the_write_has_left[half-written again behind]",
        "test_the_operand_is_what_the_write_has_left[first_value-]",
        "test_the_operand_is_what_the_write_has_left[channel-]",
        "test_the_operand_is_what_the_write_has_left[under_no_grad-written again behind]",
    ),
    "test_asked_options.py": ("test_a_contradiction_is_an_error[compile-first2-later2-level_weights='static']",),
    "test_attachment.py": (
        "test_another_backend_warns[eager-False]",
        "test_save_and_load_of_transformers",  # models/test_checkpoint.py
        "test_revert_leaves_nothing[True]",
        "test_no_false_alarm[_forwards-False]",
        "test_no_false_alarm[_whole-False]",
    ),
    "test_backend.py": (
        "test_bfloat16_autocast[False]",
        "test_smallest_shapes[1-64]",
        "test_smallest_shapes[2-1]",
    ),
    "test_calls_differ.py": ("test_dropout_hides_no_layer_behind_it[False]",),
    "test_missed.py": ("test_wrappers_that_call_us[by_lambda]",),
    "test_nested_gradients.py": ("test_has_the_gradients_of_autograd[a known function]",),
    "test_processes.py": (
        "test_first_look_up_and_logs[loglinear-0]",
        "test_first_look_up_and_logs[+loglinear-1]",
    ),
    "test_repro.py": ("test_the_file_runs_by_itself[tabled]",),
}


def is_second_case(file: Path, name: str) -> bool:
    """Whether `make test` leaves this case out."""
    return name in SECOND_CASES.get(_within(file), ())


def is_long(file: Path, function: str, fixtures: Collection[str]) -> bool:
    """Whether `make check` leaves this test out."""
    name = _within(file)
    return (
        not COMPILING.isdisjoint(fixtures)
        or name.split("/")[0] in LONG_FOLDERS
        or name in LONG_FILES
        or function in LONG_TESTS.get(name, ())
    )


def _within(file: Path) -> str:
    return file.relative_to(FOLDER).as_posix() if file.is_relative_to(FOLDER) else file.name
