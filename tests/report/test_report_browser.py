"""The page in headless Chromium: it runs without errors, shows numbers, and can be read by pointer and by keyboard."""

from __future__ import annotations

import shutil
import time

import pytest

from gem.report.page import visible, write_report
from tests.report.report_data import HOSTILE, completion_row, hostile_rows, make_run, write_rows

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None or shutil.which("chromedriver") is None:
    pytest.skip("needs chromium and chromedriver on the PATH (Debian: chromium-driver)", allow_module_level=True)
pytest.importorskip("selenium", reason="needs selenium: pip install selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WAIT = 30.0  # seconds; what is waited for takes a fraction of one on a machine that is free


class Page:
    """A browser with one page open, and the questions that the tests ask of it."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path, width: int = 1200, height: int = 900, scheme: str = "light") -> Page:
        frame = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", frame)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        self.js("try { localStorage.clear() } catch {}")
        self.driver.refresh()
        return self

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, script: str, *arguments):
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + WAIT
        while not (value := self.js(f"return {script}", *arguments)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)
        return value

    def tokens(self, card: int = 0):
        """The elements of the tokens of a card, once it has come to the screen."""
        self.js("document.querySelectorAll('.card')[arguments[0]].scrollIntoView({block: 'center'})", card)
        self.until("document.querySelectorAll('.card')[arguments[0]].querySelector('.t')", card)
        return self.js("return [...document.querySelectorAll('.card')[arguments[0]].querySelectorAll('.t')]", card)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def errors(self) -> list[dict]:
        return self.driver.get_log("browser")

    def choose(self, select: str, value: str) -> None:
        Select(self.one(f"#{select}")).select_by_value(value)

    def search(self, text: str, found: str) -> None:
        """Types into the search field and waits for the count of completions."""
        self.one("#query").clear()
        self.one("#query").send_keys(text)
        self.until("document.querySelector('#count').textContent.startsWith(arguments[0])", found)

    def numbers(self, name: str) -> list[str]:
        """A figure of all cards, in the page's order."""
        cards = "[...document.querySelectorAll('.card .figures div')]"
        return self.js(f"return {cards}.filter(d => d.children[0].textContent == arguments[0])"
                       ".map(d => d.children[1].firstChild.textContent)", name)  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run's page and the page of hostile completions."""
    root = tmp_path_factory.mktemp("pages")
    return {
        "run": write_report(make_run(root / "run", num_prompts=8), root / "run.html"),
        "hostile": write_report(write_rows(root / "hostile.jsonl", hostile_rows()), root / "hostile.html"),
    }


@pytest.fixture
def run(driver, files) -> Page:
    page = Page(driver).open(files["run"])
    yield page
    assert page.errors() == []


def test_hover_shows_the_numbers_of_a_token(run):
    row = completion_row(0, 0, seed=1)
    token = run.tokens()[4]
    ActionChains(run.driver).move_to_element(token).perform()
    tip = run.until("!document.querySelector('#tip').hidden && document.querySelector('#tip').innerText")
    assert f"token 5 of {len(row['tokens'])}" in tip
    assert f"{row['entropy'][4]:.3f} nats" in tip.replace("−", "-") or row["entropy"][4] < 0.01
    assert f"{row['logprob'][4]:.3f} nats" in tip.replace("−", "-") or abs(row["logprob"][4]) < 0.01
    assert "rank" in tip and len(run.all("#tip meter")) == 5
    ActionChains(run.driver).move_to_element(run.one("h1")).perform()
    assert run.one("#tip").get_attribute("hidden")


def test_colours_forks_and_the_answer(run):
    row = completion_row(0, 0, seed=1)
    tokens = run.tokens()
    assert "".join(run.js("return arguments[0].map(t => t.textContent)", tokens)) == row["completion"]
    levels = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)
    classes = run.js("return arguments[0].map(t => t.className)", tokens)
    for words, entropy, fork in zip(classes, row["entropy"], row["fork"]):
        assert f"e{sum(float(f'{entropy:.4g}') >= x for x in levels)}" in words.split() and ("fork" in words) == fork
    answer = run.js("return [...document.querySelectorAll('.card')[0].querySelectorAll('.answer .t')].map(t => t.i)")
    assert answer == [len(tokens) - 2, len(tokens) - 1]
    shadows = run.js("return arguments[0].map(t => getComputedStyle(t).boxShadow != 'none')", tokens)
    assert shadows == row["fork"]  # a fork is told by more than its colour
    run.choose("colour", "logprob")
    classes = run.js("return arguments[0].map(t => t.className)", tokens)
    for words, value in zip(classes, row["logprob"]):
        assert f"e{sum(-float(f'{value:.4g}') >= x for x in levels)}" in words.split()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_level_can_be_read_and_grows_in_contrast(driver, files, scheme):
    page = Page(driver).open(files["run"], scheme=scheme)
    levels = page.js("""
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const light = (colour) => {
          canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((x) => x / 255)
            .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const card = document.querySelector(".card"), found = [];
        for (let k = 0; k <= 10; k++) {
          const token = document.createElement("span");
          token.className = `t e${k}`;
          card.append(token);
          const style = getComputedStyle(token), paper = getComputedStyle(card).backgroundColor;
          const ground = k ? style.backgroundColor : paper;
          found.push([light(style.color), light(ground), light(paper)]);
          token.remove();
        }
        return found;""")

    def contrast(a, b):
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    assert min(contrast(text, ground) for text, ground, _ in levels) >= 4.5
    steps = [contrast(ground, paper) for _, ground, paper in levels]
    assert steps == sorted(steps) and steps[-1] > 10 and len(set(steps)) == 11


def test_the_keyboard_reaches_and_walks_the_tokens(run):
    tokens = run.tokens()
    row = completion_row(0, 0, seed=1)
    run.js("document.querySelector('.whole summary').focus()")
    run.press(Keys.TAB)
    here = "document.activeElement"
    assert run.js(f"return {here}.i") == 0
    run.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert run.js(f"return {here}.i") == 2
    tip = run.js("return document.querySelector('#tip').innerText")
    assert "token 3 of" in tip and run.js(f"return {here}.getAttribute('aria-describedby')") == "tip"
    run.press(Keys.ARROW_LEFT)
    assert run.js(f"return {here}.i") == 1
    run.press("f")
    assert run.js(f"return {here}.i") == next(i for i, fork in enumerate(row["fork"]) if fork and i > 1)
    run.press("a")
    assert run.js(f"return {here}.i") == len(tokens) - 2
    run.press(Keys.END)
    assert run.js(f"return {here}.i") == len(tokens) - 1
    before = run.js(f"return {here}.getBoundingClientRect().top")
    run.press(Keys.ARROW_UP)
    assert run.js(f"return {here}.getBoundingClientRect().top") < before
    run.press(Keys.ESCAPE)
    assert run.one("#tip").get_attribute("hidden")
    assert run.js("return document.querySelectorAll('.card')[0].querySelectorAll('.t[tabindex=\"0\"]').length") == 1
    run.press(Keys.TAB)  # one stop for a whole completion, and out again
    assert run.js(f"return {here}.matches('.card:first-child summary')")
    run.press(Keys.SHIFT, Keys.TAB)


def test_focus_goes_through_the_page_in_order_and_is_seen(run):
    run.press(Keys.TAB)
    assert run.js("return document.activeElement.className") == "skip"
    places, seen = [], []
    for _ in range(40):
        run.press(Keys.TAB)
        top, outline = run.js("""const a = document.activeElement, r = a.getBoundingClientRect();
            return [a.closest("nav") ? -1 : r.top + scrollY, getComputedStyle(a).outlineStyle];""")
        places.append(top)
        seen.append(outline)
    assert set(seen) == {"solid"} or set(seen) == {"auto", "solid"}
    sections = run.js(
        "return [...document.querySelectorAll('section[id]')].map(s => s.getBoundingClientRect().top + scrollY)"
    )
    order = [sum(top >= start for start in sections) for top in places]
    assert order == sorted(order)


def test_filters(run):
    everything = 3 * 8 * 4
    assert run.one("#count").text == f"{everything} of {everything} completions, 24 of 24 prompts"
    run.choose("correct", "true")
    assert run.one("#count").text.startswith(f"{everything // 2} of")
    assert {e.text for e in run.all(".is.right, .is.wrong")} == {"✓ right"}
    run.choose("correct", "false")
    assert {e.text for e in run.all(".is.right, .is.wrong")} == {"✗ wrong"}
    run.choose("correct", "null")
    assert run.one("#count").text.startswith("0 of") and not run.all(".card")
    run.choose("correct", "")
    run.choose("step", "12")
    assert run.one("#count").text == f"32 of {everything} completions, 8 of 24 prompts"
    assert all("SEGA step 12" in e.text for e in run.all(".group > h3"))


def test_sorting(run):
    def numbers(name):
        return [float(text.replace("−", "-")) for text in run.numbers(name)]

    run.choose("step", "1")
    for key, name in (("score", "score"), ("length", "tokens"), ("advantage", "advantage")):
        run.choose("sort", key)
        run.choose("order", "-1")
        found = numbers(name)
        groups = [found[i : i + 4] for i in range(0, len(found), 4)]
        assert len(groups) == 8 and all(group == sorted(group, reverse=True) for group in groups)
        assert [group[0] for group in groups] == sorted((group[0] for group in groups), reverse=True)
        run.choose("order", "1")
        assert numbers(name)[0] == min(found)
    run.choose("sort", "correct")
    run.choose("order", "-1")
    marks = [e.text for e in run.all(".is.right, .is.wrong")][:4]
    assert marks == ["✓ right"] * 2 + ["✗ wrong"] * 2
    run.choose("sort", "feature:length")
    assert float(run.numbers("tokens")[0]) == max(numbers("tokens"))


def test_search(run):
    run.search("9 bags of 7 apples", "12 of")  # in the prompt of number 7, at each of three steps
    assert {e.text for e in run.all(".prompt")} == {"Question: Ada has 9 bags of 7 apples. How many?"}
    texts = [completion_row(p, c, seed=s)["completion"] for s in (1, 12, 24) for p in range(8) for c in range(4)]
    phrase = texts[-1].strip().split("\n")[1][2:-2]  # over the borders of tokens
    assert len(phrase.split()) > 3
    run.search(phrase.upper(), f"{sum(phrase in text for text in texts)} of")
    run.tokens()
    found = "[...(CSS.highlights.get('found') ?? [])]"  # marked again once the text is cut into tokens
    run.until(
        f"{found}.length && {found}.every(r => r.startContainer.isConnected && r.startContainer != r.endContainer)"
    )
    assert set(run.js(f"return {found}.map(String)")) == {phrase}
    run.search("not in any of them", "0 of")
    assert not run.all(".card")


def test_more_prompts_come_on_request(run):
    assert len(run.all(".group")) == 20 and run.one("#more").text == "Show 4 more prompts (4 left)"
    run.js("arguments[0].click()", run.one("#more"))
    assert len(run.all(".group")) == 24 and not run.one("#more").is_displayed()
    assert run.js("return document.activeElement === document.querySelectorAll('.group')[20]")


def test_features_open_and_close_together(run):
    assert not run.one(".all-features").get_attribute("open")
    run.one("#features").click()
    assert all(e.get_attribute("open") for e in run.all(".all-features"))
    assert run.all(".features dt")[0].text == "h_final"


def test_charts_read_out_the_step_under_the_pointer(run):
    box = next(b for b in run.all(".chart-box") if "KL from the start" in b.text)
    plot = box.find_element(By.CSS_SELECTOR, ".plot")
    assert "SEGA step 24" in box.text
    run.js("arguments[0].scrollIntoView({block: 'center'})", box)
    ActionChains(run.driver).move_to_element(plot).perform()
    assert "SEGA step 24" not in box.text and "SEGA step 1" in box.text
    ActionChains(run.driver).move_to_element(run.one("nav")).perform()
    assert "SEGA step 24" in box.text
    run.js("arguments[0].focus()", plot)
    run.press(Keys.HOME)
    for _ in range(8):
        run.press(Keys.ARROW_RIGHT)
    assert "SEGA step 9" in box.text and "guard h_final: fork_weight is now 0.5" in box.text
    value = plot.get_attribute("aria-valuetext")
    assert value.startswith("SEGA step 9, KL 0.0") and "guard h_final" in value
    run.press(Keys.TAB)
    assert run.js("return document.activeElement !== arguments[0]", plot)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(driver, files, scheme):
    page = Page(driver).open(files["run"], scheme=scheme)

    def is_dark():
        return page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"

    assert is_dark() == (scheme == "dark")
    button = page.one("#theme")
    for name, dark in (("light", False), ("dark", True), ("auto", scheme == "dark")):
        button.click()
        assert button.text == f"Theme: {name}" and is_dark() == dark
    assert page.errors() == []


@pytest.mark.parametrize("name", ["run", "hostile"])
def test_a_narrow_screen_does_not_scroll_sideways(driver, files, name):
    page = Page(driver).open(files[name], width=360, height=740)
    for details in page.all("details"):
        page.js("arguments[0].open = true", details)
    assert page.js("return document.documentElement.scrollWidth") <= 360
    page.js("document.querySelector('.t').focus()")
    tip = page.js(
        "const r = document.querySelector('#tip').getBoundingClientRect(); return [r.left, r.right, r.bottom]"
    )
    assert tip[0] >= 0 and tip[1] <= 360 and tip[2] <= 740
    assert page.errors() == []


def test_hostile_completions_are_text(driver, files):
    page = Page(driver).open(files["hostile"])
    page.tokens()
    assert page.js("return [document.scripts.length, document.querySelectorAll('img, iframe, object').length]") == [
        4,
        0,
    ]
    texts = page.js("return [...document.querySelectorAll('.card .text')].map(e => e.textContent)")
    expected = "".join(map(visible, HOSTILE))
    assert texts[0].startswith(expected) and expected in texts[1]
    assert "‮" not in page.js("return document.body.textContent")
    prompt = page.one(".prompt").text
    assert HOSTILE[1] in prompt and "{{7*7}}" in prompt and "⟨U+202E⟩" in prompt
    assert HOSTILE[0] in page.js("return document.querySelector('.features dt').textContent")
    assert page.errors() == []  # no alert was open, no image asked for, the policy had nothing to refuse


def test_the_policy_stops_a_script_that_got_in(driver, files):
    page = Page(driver).open(files["hostile"])
    page.js("""const s = document.createElement("script"); s.textContent = "window.ran = true"; document.body.append(s);
               const i = document.createElement("img"); i.src = "x.png"; document.body.append(i);""")
    assert page.js("return window.ran") is None
    assert any("Content Security Policy" in entry["message"] for entry in page.errors())


def test_a_completion_of_50_000_tokens_stays_fast(driver, files):
    page = Page(driver).open(files["hostile"])
    assert page.js("return performance.getEntriesByType('navigation')[0].domInteractive") < 20_000
    page.tokens(2)
    card = "document.querySelectorAll('.card')[2]"
    page.until(f"{card}.querySelectorAll('.t').length >= 400")  # parts are made as they come to the screen
    assert len(page.tokens(2)) == 400  # the head, and the tail with the answer
    assert page.js(f"return {card}.querySelector('.answer').textContent") == " w49998 w49999"
    seconds = page.js(f"""const start = performance.now(); {card}.querySelector(".gap").click();
        {card}.getBoundingClientRect(); return (performance.now() - start) / 1000""")
    assert seconds < 10
    length, made = page.js(
        f"return [{card}.querySelector('.text').textContent.length, {card}.querySelectorAll('.t').length]"
    )
    assert length > 300_000 and 0 < made < 20_000  # all of it is there, little of it as elements
    page.js("document.activeElement.scrollIntoView()")
    page.press(Keys.END)
    assert page.js("return document.activeElement.textContent") == " w49999"
    assert "token 50,000 of 50,000" in page.js("return document.querySelector('#tip').innerText")
    page.press(Keys.HOME)
    assert page.js("return document.activeElement.i") == 0
    assert page.errors() == []


def test_printing_shows_all_tokens_on_white(driver, files):
    page = Page(driver).open(files["run"], scheme="dark")
    page.js("dispatchEvent(new Event('beforeprint'))")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert page.js("return [...document.querySelectorAll('.text')].every(e => e.querySelector('.t'))")
    assert page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 250)"
    assert not page.one("nav").is_displayed() and not page.one(".tools").is_displayed()
