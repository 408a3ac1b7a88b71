"""The page to chat in, in a real browser: answers that stream, turns that add up, stopping, beginning anew, and the key."""

import time

import pytest
from running_server import running, write_served_model

from quern.serving.app import make_app
from quern.serving.model import ServedModel
from quern.serving.models import Models

pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

KEY = "secret"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = write_served_model(tmp_path_factory.mktemp("page") / "model", eos_token_id=None)
    load = {name: lambda name=name: ServedModel(folder, name, threads=1) for name in ("tiny", "other")}
    with running(make_app(Models(load), KEY)) as found:
        yield found


class ChatPage:
    """What a person does there, and sees."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address
        browser.get(f"{address}/")

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, kind):
        return [found.text for found in self.browser.find_elements(By.CSS_SELECTOR, f"#log .{kind}")]

    def until(self, condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    def give_key(self):
        self.until(lambda: self.one("#key").is_displayed())
        self.one("#key").send_keys(KEY, Keys.TAB)
        self.until(lambda: len(self.browser.find_elements(By.CSS_SELECTOR, "#model option")) == 2)

    def say(self, text):
        self.one("#text").send_keys(text, Keys.ENTER)

    def done(self):
        return self.one("#send").text == "Send"


@pytest.fixture
def chat(browser, address):
    page = ChatPage(browser, address)
    page.give_key()
    browser.get_log("browser")
    yield page
    assert browser.get_log("browser") == []


def test_two_turns(chat):
    assert [option.text for option in chat.browser.find_elements(By.CSS_SELECTOR, "#model option")] == ["tiny", "other"]
    for turn, said in enumerate(("Hello", "And now?"), start=1):
        chat.say(said)
        chat.until(lambda turn=turn: chat.done() and len(chat.texts("note")) == turn)
    assert chat.texts("user") == ["Hello", "And now?"]
    assert len(chat.texts("assistant")) == 2
    assert all("tokens/s" in note for note in chat.texts("note"))
    assert chat.one("#text").get_attribute("value") == ""


def test_a_new_conversation_has_nothing_of_the_old_one(chat):
    chat.browser.execute_script(
        "window.sent = []; const real = window.fetch;"
        "window.fetch = (to, how) => { window.sent.push(how?.body); return real(to, how); };"
    )
    chat.say("Tell me a long story")
    chat.until(lambda: chat.texts("assistant") or chat.done())
    chat.one("#clear").click()  # while it answers
    chat.until(chat.done)
    assert chat.texts("user") == chat.texts("assistant") == []
    chat.say("Something else")
    chat.until(lambda: chat.done() and chat.texts("note"))
    last = chat.browser.execute_script("return JSON.parse(window.sent.at(-1)).messages")
    assert last == [{"role": "user", "content": "Something else"}]


def test_without_the_key_the_page_says_what_is_wrong(browser, address):
    page = ChatPage(browser, address)
    page.until(lambda: page.one("#key").is_displayed())
    page.say("Hello")
    page.until(lambda: page.texts("error"))
    assert "key" in page.texts("error")[0].lower()
    browser.get_log("browser")


def test_the_page_asks_nobody_else(browser, address):
    """One file: all that it loads is from its own server."""
    page = ChatPage(browser, address)
    page.give_key()
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert loaded
    assert all(name.startswith(address) for name in loaded)


def test_a_phone(browser, address):
    browser.set_window_size(500, 800)
    page = ChatPage(browser, address)
    page.give_key()
    width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    browser.set_window_size(1280, 900)
