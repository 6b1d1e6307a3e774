# SPDX-License-Identifier: Apache-2.0
"""One ``training_step`` evaluated again: watched, weighted, and split by sample.

A recorded batch is evaluated here and nowhere else; the proof of whose row of its loss is whose is here, too.
"""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "BatchStatistic",
    "Evaluated",
    "LabelledWeights",
    "LossInput",
    "LossInputs",
    "Number",
    "OtherLabels",
    "RecordedBatch",
    "RunningStatistics",
    "SampleWeights",
    "SplitPlan",
    "Surroundings",
    "VerifiedSplit",
    "WatchedCalls",
    "WatchedLosses",
    "bytes_in_float64",
    "callable_in",
    "caller_of",
    "check_moved_buffers",
    "dot",
    "eagerly",
    "fields_of",
    "gradient",
    "graph_of",
    "ignore",
    "in_float32",
    "in_float64",
    "in_half",
    "is_low",
    "length_of",
    "logging_to",
    "plain_numbers",
    "pull_back_updates",
    "refuse_cut_graphs",
    "refusing_by_name",
    "relabelled",
    "resting_hooks",
    "surroundings_of",
    "takes_batch_idx",
    "twice_differentiable_kernels",
    "unit_weights",
    "untouched_module",
    "untouched_options",
]
