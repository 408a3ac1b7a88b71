"""The language that people are spoken to in: how it is chosen, and what stays the same in every one."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from rich.console import Console, RenderableType
from sample_results import SCENARIOS, sample_results, sample_tool_results

from quern.advisor.recommend import recommend
from quern.advisor.retold import retold
from quern.cli.views import results as views
from quern.core.errors import UserError
from quern.core.results import Results
from quern.core.text import language
from quern.core.text.language import english, gettext, ngettext, of_environment, speak, speaking, spoken
from quern.report.html import render

CHINESE = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
ASKED = (
    {},
    {"max_size": 3_000_000},
    {"max_size": 100, "max_memory": 1000},
    {"max_memory": 400_000_000, "context": 8192},
    {"max_loss": 0.01},
    {"min_agreement": 0.97, "min_speed": 500.0},
    {"min_speed": 5000.0},
    {"target": "llama.cpp"},
    {"target": "openvino", "licences": ["MIT"]},
)


@pytest.fixture(autouse=True)
def english_again() -> Iterator[None]:
    with english():
        yield


def shown(what: RenderableType, width: int = 10_000) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what, crop=False)
    return console.file.getvalue()


def numbers(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))


class Visible(HTMLParser):
    """What a page shows, its titles and labels included."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.skipped = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipped += tag in ("style", "script")
        self.texts += [value for name, value in attrs if name in ("title", "aria-label", "placeholder") and value]

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.texts.append(data)


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_GB.UTF-8"}, "en"),
        ({"LANG": "C", "LC_ALL": "zh_SG"}, "zh"),
        ({"LANGUAGE": "de:zh:en", "LANG": "en_US.UTF-8"}, "zh"),
        ({"LANGUAGE": "", "LANG": "zh"}, "zh"),
        ({"LANG": "de_DE@euro"}, "en"),
        ({"LANG": "../../etc"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "QUERN_LANGUAGE": "en"}, "en"),
        ({"LANG": "C", "QUERN_LANGUAGE": "zh"}, "zh"),
    ],
)
def test_the_locale_says_which_language(environment, code):
    assert of_environment(environment) == code


@pytest.mark.parametrize("code", ["zh", "zh_CN", "zh-Hans", "ZH"])
def test_variants_are_the_language(code):
    speak(code)
    assert spoken() == "zh"
    assert gettext("not measured") == "未测量"


@pytest.mark.parametrize("code", ["xx", "", "../zh", "chinese"])
def test_other_languages_are_refused_with_those_that_there_are(code):
    with pytest.raises(UserError, match="there are en, zh"):
        speak(code)
    assert spoken() == "en"


def test_a_language_for_a_while():
    speak("zh")
    with english():
        assert gettext("not measured") == "not measured"
    assert spoken() == "zh"
    with pytest.raises(RuntimeError), speaking("en"):
        raise RuntimeError
    assert spoken() == "zh"


def test_places_are_filled_once():
    assert gettext("{size} in bf16", size="{size} {0}") == "{size} {0} in bf16"
    assert ngettext("{cores} core", "{cores} cores", 1, cores=1) == "1 core"
    assert ngettext("{cores} core", "{cores} cores", 2, cores=2) == "2 cores"
    assert gettext("") == ""
    speak("zh")
    assert gettext("") == ""


@pytest.mark.parametrize("make", [sample_results, sample_tool_results])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_recommendation_has_the_same_numbers_and_names_in_both(make, scenario):
    rows = make(scenario).rows
    for asked in ASKED:
        here = recommend(rows, scenario, **asked)
        with speaking("zh"):
            there = recommend(rows, scenario, **asked)
            told = shown(views.recommendation(there))
        assert there.choice == here.choice
        assert [(one.name, one.score) for one in there.ranking] == [(one.name, one.score) for one in here.ranking]
        assert [one.name for one in there.excluded] == [one.name for one in here.excluded]
        assert numbers(told) == numbers(shown(views.recommendation(here)))
        assert CHINESE.search(told)


@pytest.mark.parametrize("make", [sample_results, sample_tool_results])
def test_tables_have_the_same_numbers_in_both(make):
    results = make("overall")
    here = [shown(views.results(results)), *(shown(views.row(row)) for row in results.rows)]
    with speaking("zh"):
        there = [shown(views.results(results)), *(shown(views.row(row)) for row in results.rows)]
    assert [numbers(text) for text in there] == [numbers(text) for text in here]


@pytest.mark.parametrize("width", [80, 120])
def test_columns_stand_below_their_headings(width):
    """A Chinese character takes two cells: each line of a table is as wide as the first one, in cells."""
    from rich.cells import cell_len

    with speaking("zh"):
        lines = shown(views.Comparison(sample_results("overall")), width).splitlines()
    rules = [line.rstrip() for line in lines if set(line.strip()) == {"─"}]
    assert rules
    assert max(cell_len(line.rstrip()) for line in lines) <= max(width, *map(cell_len, rules))


@pytest.mark.parametrize("make", [sample_results, sample_tool_results])
def test_a_page_has_the_same_numbers_in_both(make):
    results = make("overall")
    here, there = Visible(render(results)), None
    with speaking("zh"):
        page = render(results)
    there = Visible(page)
    assert '<html lang="zh-Hans">' in page
    assert numbers(" ".join(there.texts)) == numbers(" ".join(here.texts))
    assert len(there.texts) == len(here.texts)


def test_no_sentence_of_a_page_is_left_in_english():
    results = sample_tool_results("overall")
    told_by_data = " ".join([results.model_dump_json(), "quern check", "Download"])
    with speaking("zh"):
        texts = Visible(render(results)).texts
    words = re.compile(r"[a-z]+(?: [a-z]+){2,}")
    left = [found for text in texts for found in words.findall(text) if found not in told_by_data]
    assert left == [found for found in left if found.startswith("measured")]  # names of fields: measured: gemm ...


def test_a_page_speaks_its_language_in_its_script_too():
    results = sample_results("overall")
    assert '"messages"' not in render(results)
    with speaking("zh"):
        assert '"better":"\\u66f4\\u597d"' in render(results)


def test_a_stored_recommendation_is_told_again_where_it_would_be_the_same():
    results = sample_results("storage")
    assert retold(results) is results.recommendation
    with speaking("zh"):
        again = retold(results)
        assert again.choice == results.recommendation.choice
        assert all(CHINESE.search(reason) for reason in again.reasons)


def test_a_stored_recommendation_under_limits_stays_as_it_is():
    results = sample_results("storage", max_size=3_000_000)
    with speaking("zh"):
        assert retold(results) is results.recommendation


def test_files_stay_english():
    with speaking("zh"), english():
        stored = recommend(sample_results("overall").rows, "overall").model_dump_json()
    assert not CHINESE.search(stored)
    assert not CHINESE.search(
        Results.model_validate_json(sample_results("overall").model_dump_json()).model_dump_json()
    )


def test_every_language_has_a_compiled_catalogue():
    assert language.languages() == ["en", "zh"]
