"""`hf-kvcache bench`: methods on one model in one table and one page."""

from hf_kvcache.bench.page import write_page
from hf_kvcache.bench.record import Record, Setting, parse_setting, run_bench, write_csv
