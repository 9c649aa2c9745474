"""What a run writes and shows: metrics.jsonl, samples.jsonl, TensorBoard, live progress and the final table.

Works from plain dictionaries and files, without torch; TensorBoard's writer alone imports it, when asked for.
"""

from nrt_megatron.report.metrics import MetricsWriter, read_metrics
from nrt_megatron.report.progress import Progress
from nrt_megatron.report.samples import PromptSample, SamplesWriter, TraceSample, samples_of
from nrt_megatron.report.summary import print_summary
