"""The automatic plan: what every choice costs on the user's own text, and the cheapest plan for the bytes asked."""

from hf_kvcache.planning.costs import Costs, measure_costs
from hf_kvcache.planning.share import Pair, Sharing, fold, solve_shared
from hf_kvcache.planning.solve import solve
from hf_kvcache.planning.tune import Tuned, Tuner, tune
from hf_kvcache.planning.verify import Verified, verify
