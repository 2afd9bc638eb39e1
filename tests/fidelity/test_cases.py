"""Which test covers which kind of trouble with state; a table that can't point at a test that is gone.

==== =================================================================================================================
D1   non-tensor leaves come back
D2   containers that differ from the target's; no target at all
D3   int, bool, float, None and tuple keys keep their type
D4   keys with dots, slashes, unicode, empty, very long; keys that collide after joining
D5   tied weights once, both names restored; views that overlap
D6   small views of big storages store only what is visible
D7   strides, transposes, expand, channels_last, conj and neg views, complex
D8   sparse, nested, meta tensors, unknown subclasses: supported, or refused before writing, naming the key
D9   0-dim, empty, uneven shards
D10  every dtype; no silent casts
D11  values of NumPy and the standard library, with every bit
D12  optimizer state by name, partial, regrouped, in other dtypes; loading has no side effects
D13  2N steps straight == N + restore + N: EMA, scaler, schedulers, samplers, loaders mid-epoch
D14  ``module.`` and ``_orig_mod.`` prefixes
D15  per-rank values stay per rank; replicas that differ are found
D16  other world sizes and meshes: values are those of the global tensor
D17  no second full copy on save or load
==== =================================================================================================================

"Tables" are ``support/state_tables.py``: ``test_tables`` runs every entry through disk, bucket, ``read``, load in place
and a fresh process, ``test_ranks`` through another world size, ``test_random_states`` through any nesting of them and
through export and import.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLES = (
    "fidelity/test_tables.py::test_value_comes_back_when_stored",
    "fidelity/test_tables.py::test_everything_comes_back_when_read_in_a_fresh_process",
    "fidelity/test_ranks.py::test_every_kind_of_value_comes_back_when_loaded_at_another_world_size",
    "fidelity/test_random_states.py::test_random_states_come_back_from_disk_and_bucket_and_export",
)
TENSORS = (
    "fidelity/test_tables.py::test_tensor_comes_back_when_stored",
    "fidelity/test_tables.py::test_tensor_of_a_module_comes_back_in_place_when_stored",
    *TABLES[1:],
)
REFUSED = "fidelity/test_tables.py::test_value_is_refused_by_key_and_nothing_is_written_when_it_can_not_be_stored"
MATRIX = "distributed/test_reshard_matrix.py::test_state_is_that_of_the_global_tensors_when_loaded_into_any_layout"

CASES: dict[str, tuple[str, ...]] = {
    "D1": TABLES,
    "D2": (
        "fidelity/test_strictness.py::test_nothing_is_changed_when_the_target_does_not_fit",
        "unit/dcp/test_target.py::test_plain_values_are_replaced_in_their_nearest_container",
        "unit/dcp/test_target.py::test_tuples_keep_their_tensors_and_get_new_values",
        "unit/dcp/test_target.py::test_lists_of_another_length_are_a_misfit_when_they_hold_tensors",
        *TABLES,
    ),
    "D3": (*TABLES, "unit/format/test_tree.py::test_hashable_value_comes_back_when_it_is_a_key"),
    "D4": (
        *TABLES,
        "unit/format/test_names.py::test_first_keeps_the_stock_name_when_two_collide",
        "unit/format/test_names.py::test_names_are_unique_and_repeatable",
        "unit/dcp/test_binder.py::test_keys_of_any_script_and_length_come_back",
    ),
    "D5": (
        "fidelity/test_consistency.py::test_ties_come_back_as_ties_when_read_or_loaded_without_a_target",
        "unit/dcp/test_views.py::test_overlapping_views_overlap_again",
        "unit/dcp/test_loader.py::test_tied_weights_stay_tied_and_equal",
        "unit/format/test_stock.py::test_both_names_load_when_tensors_are_tied",
        "fidelity/test_ranks.py::test_each_stage_gets_its_own_layers_back",
    ),
    "D6": ("fidelity/test_consistency.py::test_only_what_is_visible_of_a_big_storage_is_stored",),
    "D7": (
        *TENSORS,
        "unit/dcp/test_loader.py::test_a_view_is_filled_through_when_it_is_the_target",
        "unit/dcp/test_loader.py::test_the_rest_of_a_storage_is_left_alone_when_a_view_is_the_target",
    ),
    "D8": (
        *TENSORS,
        REFUSED,
        "fidelity/test_ranks.py::test_wrapper_tensors_inside_dtensors_are_resharded_part_by_part",
    ),
    "D9": (*TENSORS, MATRIX),
    "D10": (
        *TENSORS,
        "fidelity/test_tables.py::test_every_dtype_of_torch_is_in_the_table",
        "unit/dcp/test_target.py::test_lenient_loading_fills_what_fits_and_reports_the_rest",
        "fidelity/test_resharded.py::test_misfits_are_told_to_all_ranks_and_change_none_of_them",
    ),
    "D11": TABLES,
    "D12": (
        "fidelity/test_optimizers.py::test_training_goes_on_bit_for_bit_when_loaded",
        "fidelity/test_optimizers.py::test_empty_state_stays_empty_and_nothing_fires_when_saved_and_loaded",
        "fidelity/test_optimizers.py::test_state_and_hyperparameters_follow_the_parameters_when_groups_change",
        "fidelity/test_optimizers.py::test_moments_keep_their_dtype_when_it_is_not_the_parameters",
        "fidelity/test_resharded.py::test_optimizers_keep_every_moment_and_option_when_resharded_and_back",
        MATRIX,
    ),
    "D13": (
        "fidelity/test_goes_on.py::test_training_goes_on_as_if_it_had_never_stopped",
        "integration/test_manager.py::test_twice_n_steps_equal_n_and_a_restore_and_n",
        "distributed/test_manager_ranks.py::test_twice_n_steps_equal_n_and_a_restore_and_n_on_two_ranks",
        "unit/manager/test_loader.py::test_the_rest_of_the_epoch_and_the_next_ones_are_the_same_after_a_resume",
        "fidelity/test_optimizers.py::test_lr_scheduler_and_optimizer_stay_connected_when_loaded",
    ),
    "D14": (
        "fidelity/test_ranks.py::test_values_are_the_same_when_saved_and_loaded_by_differently_wrapped_models",
        "unit/dcp/test_target.py::test_wrapper_prefixes_in_stored_names_are_seen_through",
        "unit/dcp/test_target.py::test_a_wrapped_target_takes_a_plain_checkpoint",
    ),
    "D15": (
        "fidelity/test_ranks.py::test_each_rank_gets_the_values_of_its_number_modulo_the_saved_world",
        "fidelity/test_ranks.py::test_key_and_ranks_are_named_and_nothing_is_saved_when_replicas_differ",
        "fidelity/test_ranks.py::test_buffers_are_those_of_rank_0_when_ddp_ranks_differ",
        "distributed/test_dcp_agreement.py::test_large_replicas_are_compared_in_rotation_or_all_or_never",
    ),
    "D16": (
        MATRIX,
        "distributed/test_dcp_reshard.py::test_state_is_bit_equal_when_loaded_at_another_world_size",
        "distributed/test_dcp_reshard.py::test_any_placement_loads_into_any_other_when_meshes_have_two_dimensions",
        "fidelity/test_ranks.py::test_each_stage_gets_its_own_layers_back",
    ),
    "D17": (
        "fidelity/test_memory.py::test_a_save_and_a_load_take_no_second_copy_of_the_state",
        "unit/dcp/test_sharing.py::test_windows_hold_everything_once_and_no_rank_gets_more_than_it_can_hold",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_test_the_table_names_is_there(case: str) -> None:
    for place in CASES[case]:
        file, _, name = place.partition("::")
        assert re.search(rf"^ *def {name}\(", (TESTS / file).read_text(), re.M), place


def test_the_table_has_every_case_it_describes() -> None:
    assert __doc__ is not None
    assert re.findall(r"^(D\d+) ", __doc__, re.M) == list(CASES)
