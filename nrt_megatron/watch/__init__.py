"""What a run shows when it goes wrong without failing: collapse and stragglers, judged from numbers alone.

Without torch: what goes in are rows of metrics and seconds, what comes out are metrics, lines and a verdict.
"""

from nrt_megatron.watch.collapse import Alarm, CollapseError, CollapseWatch
from nrt_megatron.watch.rollbacks import Rollback
from nrt_megatron.watch.stragglers import Position, Stragglers
