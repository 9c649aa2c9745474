"""`nrt plan`: memory, work, time and traffic of a recipe on a kind of GPU. Imports no torch."""

from nrt_megatron.plan.gpus import Hardware, load_hardware
from nrt_megatron.plan.planner import model_shape, plan
from nrt_megatron.plan.result import Phase, Plan, StagePlan
