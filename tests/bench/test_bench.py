"""The benchmark of methods: its figures, its resumption, its table and its page, also in a browser."""

import csv
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from hf_kvcache.bench import Setting, parse_setting, run_bench, write_csv, write_page
from hf_kvcache.bench.page import pareto
from hf_kvcache.bench.record import read_records
from hf_kvcache.plan import CachePlan
from hf_kvcache.testing import VOCABULARY, model_state, tiny_model
from tests.letters import Letters

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
TEXT = "".join(chr(33 + (index * index + 3 * index) % 90) for index in range(9000))


SETTINGS = [
    Setting("none"),
    *parse_setting("knorm", [0.5, 0.2]),
    *parse_setting('turboquant{"bits": 2}', [0.5]),
    *parse_setting('knorm+turboquant{"bits": 4}', [0.5]),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=4096)


def run(model, folder, settings=SETTINGS, said=None):
    options = {"tasks": ["kv-4"], "contexts": 2, "length": 256, "texts": [TEXT]}
    return run_bench(model, Letters(), settings, folder, **options, say=(said if said is not None else []).append)


@pytest.fixture(scope="module")
def records(model, tmp_path_factory):
    return run(model, tmp_path_factory.mktemp("bench"))


def test_names_may_have_spaces_around_them():
    budgets = [0.5, 0.25]
    assert parse_setting('snapkv {"window": 16}', budgets)[1] == Setting("snapkv", {"window": 16, "budget": 0.25})
    assert [setting.label for setting in parse_setting(" snapkv + turboquant ", budgets)] == [
        "snapkv+turboquant budget=0.5",
        "snapkv+turboquant budget=0.25",
    ]
    assert parse_setting("yoco++ + turboquant", budgets) == [Setting("yoco+++turboquant")]


def test_budgets_go_to_methods_that_have_them():
    assert [setting.label for setting in SETTINGS] == [
        "none",
        "knorm budget=0.5",
        "knorm budget=0.2",
        "turboquant bits=2",
        "knorm+turboquant bits=4, budget=0.5",
    ]
    assert parse_setting('snapkv{"budget": 0.1}', [0.5]) == [Setting("snapkv", {"budget": 0.1})]
    with pytest.raises(ValueError, match="expected NAME"):
        parse_setting("snapkv{budget}", [])


def test_figures_say_what_a_method_does(records):
    by_name = {record.setting: record.figures for record in records}
    none, half, fifth = by_name["none"], by_name["knorm budget=0.5"], by_name["knorm budget=0.2"]
    # a log-probability in float32 is off by up to 2^-24 of its size, in both, so that the KL of a distribution to
    # itself is off by up to 2^-23 of its entropy, which is at most that of 97 equally likely tokens: 5e-7 nats
    assert abs(none["kl"]) <= 2**-23 * math.log(VOCABULARY) and none["top1"] == 1
    assert 0 < half["kl"] < fifth["kl"] and half["kl low"] <= half["kl"] <= half["kl high"]
    # the model is in float32, and this is against 16 bits
    assert none["times_smaller_than_16_bit"] == pytest.approx(0.5)
    assert half["times_smaller_than_16_bit"] < fifth["times_smaller_than_16_bit"]
    for name in ("kv-4 accuracy", "kv-4 aware nll", "prefill tokens/s", "decode tokens/s", "peak MB"):
        assert half[name] >= 0
    assert none["kv-4 nll"] == pytest.approx(none["kv-4 aware nll"], abs=1e-4)
    heads = {record.setting: torch.tensor(record.heads) for record in records}
    assert heads["none"].shape == (4, 2) and bool((heads["none"] == 1).all())
    assert float(heads["knorm budget=0.5"].mean()) == pytest.approx(0.5, abs=0.01)


def test_a_run_goes_on_where_it_was(model, tmp_path):
    before = model_state(model)
    run(model, tmp_path, SETTINGS[:2])
    path = tmp_path / "bench.jsonl"
    # the process was killed while it wrote
    path.write_text(path.read_text() + '{"run": "cut o')
    said = []
    again = run(model, tmp_path, SETTINGS[:3], said)
    assert [line.endswith("measured before") for line in said] == [True, True, False]
    assert [record.setting for record in again] == [setting.label for setting in SETTINGS[:3]]
    assert [record.setting for record in read_records(path)] == [setting.label for setting in SETTINGS[:3]]
    model_state(model).assert_equal(before)


def test_results_of_another_run_do_not_count(model, tmp_path):
    run(model, tmp_path, SETTINGS[:1])
    said = []
    run_bench(model, Letters(), SETTINGS[:1], tmp_path, tasks=[], contexts=1, length=256, texts=[TEXT], say=said.append)
    assert "measured before" not in said[0]


def test_results_of_other_weights_do_not_count(tmp_path):
    model, said = tiny_model("llama", max_position_embeddings=4096), []
    run(model, tmp_path, SETTINGS[:1], said)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.5)  # as fine-tuning leaves the embedding alone
    run(model, tmp_path, SETTINGS[:1], said)
    assert not any("measured before" in line for line in said)


def test_results_of_another_file_under_the_same_name_do_not_count(model, tmp_path):
    path, said = tmp_path / "plan.safetensors", []
    setting = Setting("planned", {"plan": str(path)})
    for bits in (8, 2):
        CachePlan.uniform(4, 2, 1.0, bits, bits).save(path)
        found = run(model, tmp_path, [setting], said)
        run(model, tmp_path, [setting], said)
    assert [line.endswith("measured before") for line in said] == [False, True, False, True]
    assert found[0].figures["times_smaller_than_16_bit"] > 3


def test_an_unknown_method_is_refused_before_anything_is_measured(model, tmp_path):
    before = model_state(model)
    with pytest.raises(ValueError, match="unknown method"):
        run(model, tmp_path / "results", [*SETTINGS[:1], Setting("nonsense")])
    assert not (tmp_path / "results").exists()
    model_state(model).assert_equal(before)


def test_a_setting_that_fails_is_recorded_and_tried_again(model, tmp_path):
    before = model_state(model)
    # a plan that is not there is noticed when the model is patched
    failing = Setting("kvsharer", {"plan": "absent.safetensors"})
    for _ in range(2):
        said = []
        failed, measured = run(model, tmp_path, [failing, SETTINGS[1]], said)
        assert failed.error.startswith("FileNotFoundError: there is no file") and not failed.figures
        assert measured.figures and not measured.error and "failed" in said[0]
    model_state(model).assert_equal(before)
    write_csv([failed, measured], tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open() as file:
        assert [row["error"] for row in csv.DictReader(file)] == [failed.error, ""]
    write_page([failed, measured], tmp_path / "bench.html", "one failed")
    page = (tmp_path / "bench.html").read_text()
    assert "there is no file" in page and page.count("<circle") == 1
    assert "Every setting failed" in pareto([])


def test_the_table_has_every_figure(records, tmp_path):
    write_csv(records, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == [record.setting for record in records]
    assert float(rows[1]["kl"]) == pytest.approx(records[1].figures["kl"], rel=1e-5)


class Tags(HTMLParser):
    """Counts tags, and checks that each is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.count, self.links = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(records, tmp_path):
    write_page(records, tmp_path / "bench.html", "a <title>")
    text = (tmp_path / "bench.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open and not tags.links and "http" not in text and "<script" not in text
    assert "a &lt;title&gt;" in text and tags.count["tr"] == len(records) + 1
    assert tags.count["circle"] == len(records) and tags.count["figure"] == len(records)


def test_a_browser_shows_the_page(records, tmp_path):
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    page = tmp_path / "bench.html"
    write_page(records, page, "KV cache methods")
    # a marker that only a browser that laid the page out can write
    probe = (
        "<script>document.title = [document.querySelectorAll('#figures tr').length,"
        "Math.round(document.querySelector('#pareto').getBoundingClientRect().width),"
        "[...document.querySelectorAll('#pareto circle')].every(c => {let b = c.getBoundingClientRect();"
        "let f = document.querySelector('#pareto').getBoundingClientRect();"
        "return b.left > f.left && b.right < f.right && b.top > f.top && b.bottom < f.bottom})].join(' ')</script>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [*command, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<title>([^<]*)</title>", done.stdout)
    assert found is not None and found[1] == f"{len(records) + 1} 760 true"
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert shot.stat().st_size > 10_000
