"""The page in a real browser: upload, ask, slide; what is broken or too large; several visitors; no strangers."""

import io
import json
import os
import urllib.request

import numpy as np
import pytest
from PIL import Image

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.glyphsearch import draw_chain, draw_question, make_scene, questions, scene_seed
from vreflection_hub_card.inference.encoding import user_turn
from vreflection_hub_card.inference.look import look
from vreflection_hub_card.space.overlay import draw_frames
from vreflection_hub_card.space.uploaded_picture import MAX_BYTES


pytest.importorskip("selenium", reason="needs pip install selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


class Visitor:
    """A browser on the page, in a visitor's words."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.until(lambda: self.all("#ask") and self.all("#picture img") and self.all("#question textarea"))

    def until(self, condition, seconds=120):
        return WebDriverWait(self.browser, seconds, 0.1).until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.until(lambda: self.all(selector))[0]

    def text(self, field):
        return self.one(f"#{field} textarea").get_property("value")

    def upload(self, path):
        self.remove_picture()
        self.one("#picture input[type=file]").send_keys(str(path))

    def take_example(self):
        self.remove_picture()
        self.one("#examples button").click()
        self.until(lambda: self.all("#picture img"))

    def remove_picture(self):
        if self.all("#picture img"):
            self.one("#picture button[aria-label='Remove Image']").click()
            self.until(lambda: not self.all("#picture img"))

    def write(self, question):
        field = self.one("#question textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(question or Keys.BACKSPACE)

    def ask(self, wait=True):
        before = self.all("#heatmap img")
        self.one("#ask").click()
        if wait:
            if before:  # the old answer is taken away first
                self.until(lambda: before[0] not in self.all("#heatmap img"))
            self.until(lambda: self.all("#heatmap img") and self.text("plain"))

    def heatmap(self):
        with urllib.request.urlopen(self.one("#heatmap img").get_attribute("src")) as file:
            return Image.open(io.BytesIO(file.read())).convert("RGB")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def cut(self, selector):
        """How many pixels of what stands in a field can't be seen without scrolling in it."""
        field = "const field = document.querySelector(arguments[0]); "
        return self.run(field + "return field.scrollHeight - field.offsetHeight", selector)

    def caption(self):
        return self.one("#caption").text

    def slide(self, key):
        before = self.caption()
        self.one("#step input[type=range]").send_keys(key)
        self.until(lambda: self.caption() != before)

    def message(self):
        """The message that came up; it is closed."""
        text = self.until(lambda: "\n".join(toast.text for toast in self.all("[data-testid=toast-body]")))
        assert "Traceback" not in text and ".py" not in text
        for button in self.all(".toast-close"):
            button.click()
        self.until(lambda: not self.all("[data-testid=toast-body]"))
        return text


@pytest.fixture(scope="module")
def visitor(new_browser, page):
    return Visitor(new_browser(), page[0])


@pytest.fixture
def ask_directly(embedded):
    """The answer and the frames that the page should show, decoded here."""

    def ask(picture, question, **options):
        seen = look(*embedded, user_turn([picture], question), ("dac",), max_new_tokens=64, **options)
        return seen.answer, draw_frames(picture, [seen.reflections[0].maps["dac"][0].numpy()])

    return ask


def differences(shown, frames):
    """How far what is shown is from each frame; it comes compressed."""
    return [np.abs(np.asarray(shown, float) - np.asarray(frame.image, float)).mean() for frame in frames]


def test_upload_ask_and_slide(visitor, ask_directly, tmp_path):
    scene, asked = draw_chain("test", 100)
    scene.image.save(tmp_path / "mine.png")
    visitor.upload(tmp_path / "mine.png")
    visitor.until(lambda: visitor.all("#picture img"))
    visitor.write(asked.text)
    visitor.ask()
    answer, frames = ask_directly(scene.image, asked.text)
    assert visitor.text("answer") == answer == asked.answer
    plain = visitor.until(lambda: visitor.text("plain"))
    assert plain and plain != answer
    assert len(frames) == 9
    assert "All looks" in visitor.caption() and visitor.caption().count("elsewhere") == 3  # the chain's shapes
    for number in range(4):  # the looks, and where the steps differ most
        if number:
            visitor.slide(Keys.ARROW_RIGHT)
            assert f"Step {number} of 8" in visitor.caption()
        visitor.until(lambda: np.argmin(differences(visitor.heatmap(), frames)) == number)  # noqa: B023
        assert differences(visitor.heatmap(), frames)[number] < 2
    assert min(differences(frames[0].image, frames[1:])) > 2  # so the map did change
    visitor.one("#zero-latents input").click()
    zeroed = visitor.until(lambda: visitor.all("#zeroed textarea") and visitor.text("zeroed"))
    assert visitor.text("answer") == answer and zeroed != answer
    visitor.one("#zero-latents input").click()
    visitor.until(
        lambda: not visitor.all("#zeroed textarea") and visitor.all("#heatmap img") and visitor.text("plain")
    )
    visitor.one("#examples button").click()  # a new picture clears what was said of the old one
    visitor.until(lambda: not visitor.all("#results") and visitor.all("#hint"))


def test_a_hurried_visitor_gets_the_answer(visitor):
    visitor.remove_picture()
    visitor.run(
        "document.querySelector('#examples button').click();"
        "const watch = new MutationObserver(() => {"
        "    if (document.querySelector('#picture img')) { watch.disconnect(); setTimeout(() => "
        "        document.querySelector('#ask').click()); }"
        "});"
        "watch.observe(document.body, {childList: true, subtree: true});"
    )
    visitor.until(lambda: visitor.all("#heatmap img") and visitor.text("plain"))


@pytest.mark.slow
def test_the_switch_is_heard_while_an_answer_comes(visitor):
    visitor.take_example()
    visitor.ask()
    visitor.one("#zero-latents input").click()
    visitor.until(lambda: visitor.all("#zeroed textarea"))  # it comes empty
    visitor.one("#zero-latents input").click()
    visitor.until(lambda: not visitor.all("#zeroed textarea") and visitor.text("plain"))


@pytest.mark.slow
def test_the_slider_follows_the_latent_steps(visitor, ask_directly):
    visitor.take_example()
    scene, asked = draw_chain("test", 3)
    visitor.until(lambda: visitor.text("question") == asked.text)
    visitor.one("#options button").click()
    count = visitor.one("#latent-steps input[type=number]")
    for steps, feedback in ((12, "dac"), (3, "hidden"), (1, "hidden")):
        count.send_keys(Keys.CONTROL, "a")
        count.send_keys(str(steps), Keys.TAB)
        visitor.one(f"#latent-feedback input[value={feedback}]").click()
        visitor.ask()
        answer, frames = ask_directly(scene.image, asked.text, latent_steps=steps, latent_feedback=feedback)
        visitor.until(lambda: "All looks" in visitor.caption())
        assert visitor.text("answer") == answer
        assert np.argmin(differences(visitor.heatmap(), frames)) == 0
        visitor.slide(Keys.END)
        assert f"Step {steps} of {steps}" in visitor.caption()
        visitor.until(lambda: np.argmin(differences(visitor.heatmap(), frames)) == steps)  # noqa: B023
        visitor.slide(Keys.HOME)
        assert "All looks" in visitor.caption()
    count.send_keys(Keys.CONTROL, "a")
    count.send_keys("8", Keys.TAB)
    visitor.one("#latent-feedback input[value=dac]").click()  # as it was: later tests share the page


@pytest.mark.parametrize(
    "name, fragment",
    [
        ("broken.png", "not a picture"),
        ("cut.png", "damaged"),
        pytest.param("huge.png", "54 megapixels", marks=pytest.mark.slow),
        pytest.param("heavy.png", "size", marks=pytest.mark.slow),
    ],
)
def test_bad_files_get_a_message(visitor, page, tmp_path, name, fragment):
    scene = draw_question("test", 101)[0].image
    scene.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    if name == "huge.png":
        Image.new("L", (9000, 6000)).save(tmp_path / name)
    else:
        content = {"broken.png": os.urandom(500), "cut.png": whole[:700], "heavy.png": whole + bytes(MAX_BYTES)}
        (tmp_path / name).write_bytes(content[name])
    visitor.upload(tmp_path / name)
    message = visitor.message()
    assert fragment in message and name in message and str(tmp_path) not in message
    visitor.until(lambda: not visitor.all("#picture img"))
    visitor.ask(wait=False)
    assert "Pick a picture" in visitor.message()
    assert "Traceback" not in page[1]()
    visitor.upload(tmp_path / "whole.png")  # the page goes on
    visitor.until(lambda: visitor.all("#picture img"))


def test_an_empty_question_gets_a_message(visitor):
    visitor.write("")
    visitor.ask(wait=False)
    assert "Ask a question" in visitor.message()


@pytest.mark.parametrize("question, steps, feedback, fragment", [("x" * 1001, 8, "hidden", "1001"), ("Where?", 0, "hidden", "1 to 16"), ("Where?", None, "hidden", "1 to 16"), ("Where?", 2.5, "hidden", "1 to 16"), ("Where?", 17, "dac", "1 to 16"), ("Where?", 8, "other", "hidden, dac")])  # fmt: skip
def test_what_the_fields_would_not_send_is_refused(question, steps, feedback, fragment):
    check_options = pytest.importorskip("vreflection_hub_card.space.page").check_options
    check_options("Where?", 8, "hidden")
    with pytest.raises(InputError, match=fragment):
        check_options(question, steps, feedback)


@pytest.mark.slow
def test_visitors_do_not_meet(visitor, page, new_browser, ask_directly, tmp_path):
    visitors = [visitor, Visitor(new_browser(), page[0])]
    expected = []
    for number, each in enumerate(visitors):
        scene = make_scene(scene_seed("test", 200 + number))
        asked = next(question for question in questions(scene) if question.kind == "attribute")
        scene.image.save(tmp_path / f"{number}.png")
        each.upload(tmp_path / f"{number}.png")
        each.until(lambda: each.all("#picture img"))  # noqa: B023
        each.write(asked.text)
        expected.append(ask_directly(scene.image, asked.text))
    for each in visitors:
        each.ask(wait=False)
    for each, (answer, frames) in zip(visitors, expected):
        each.until(lambda: each.text("answer") == answer and "All looks" in each.caption())  # noqa: B023
        each.until(lambda: differences(each.heatmap(), frames)[0] < 3)  # noqa: B023
    for each, (_, frames) in zip(visitors, expected):
        each.slide(Keys.ARROW_RIGHT)
        each.until(lambda: differences(each.heatmap(), frames)[1] < 3)  # noqa: B023
    assert expected[0][0] != expected[1][0]


@pytest.fixture(scope="module")
def phone(new_browser, page):
    return Visitor(new_browser(390, 844), page[0])


def test_a_phone_shows_whole_questions(phone):
    example = phone.text("question")
    for button in phone.all("#examples button")[1:]:
        button.click()
        phone.until(lambda: phone.text("question") != example)  # noqa: B023
        example = phone.text("question")
        assert phone.cut("#question textarea") <= 0
    phone.write("W" * 120 + " and which word of all these words is the last one?" * 8)
    assert phone.cut("#question textarea") <= 0
    assert phone.run("return document.documentElement.scrollWidth") <= 390


ANSWERS_TOP = "return document.querySelector('#answers').getBoundingClientRect().top"


def test_a_phone_scrolls_to_the_answer_once(phone):
    phone.take_example()
    phone.run("scrollTo(0, 0)")
    phone.one("#ask").click()
    phone.until(lambda: phone.all("#answers") and 0 <= phone.run(ANSWERS_TOP) < 20 and phone.text("answer"))
    phone.run("scrollTo({top: 0, behavior: 'instant'})")
    phone.until(lambda: phone.all("#heatmap img") and phone.text("plain"))
    assert phone.run("return scrollY") == 0  # the map and the other answer leave a visitor in peace
    assert phone.run("return document.documentElement.scrollWidth") <= 390
    # The map may be gone for less than the time between two looks at the page.
    phone.run(
        "window.cleared = false;"
        "new MutationObserver(() => { window.cleared ||= !document.querySelector('#heatmap img'); })"
        ".observe(document.body, {childList: true, subtree: true});"
        "document.querySelector('#ask').click(); setTimeout(() => scrollTo({top: 200, behavior: 'instant'}), 30)"
    )
    phone.until(lambda: phone.run("return window.cleared") and phone.all("#heatmap img") and phone.text("plain"))
    assert phone.run("return scrollY") == 200  # so does the answer, where they scrolled


def test_names_cover_nothing_of_their_pictures(phone):
    phone.until(lambda: phone.all("#heatmap img"))
    for name in ("picture", "heatmap"):
        bottom = phone.run(f"return document.querySelector('#{name} > label').getBoundingClientRect().bottom")
        assert phone.run(f"return document.querySelector('#{name} img').getBoundingClientRect().top") >= bottom


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_thumbs_and_boxes_stand_out(phone, theme):
    phone.until(lambda: phone.all("#step input"))
    phone.run(f"document.body.classList.toggle('dark', {str(theme == 'dark').lower()})")
    for selector in ("#step input[type=range]", "#zero-latents input"):
        seen = Image.open(io.BytesIO(phone.one(selector).screenshot_as_png)).convert("RGB")
        seen = seen.crop((0, 0, seen.height, seen.height))  # the thumb is at the left end
        behind = phone.run(
            "let at = document.querySelector(arguments[0]);"
            "while (getComputedStyle(at).backgroundColor == 'rgba(0, 0, 0, 0)' || at.matches('input')) at = at.parentElement;"
            "return getComputedStyle(at).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)",
            selector,
        )
        colours = np.unique(np.asarray(seen).reshape(-1, 3), axis=0)
        assert max(contrast(colour, behind) for colour in colours) >= 3, selector


def contrast(one, other):
    """WCAG's contrast ratio of two colours; 3 is what it asks of parts to operate."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.divide(colour, 255)]
        return np.dot(linear, (0.2126, 0.7152, 0.0722)) + 0.05

    return max(luminance(one), luminance(other)) / min(luminance(one), luminance(other))


def test_nothing_is_fetched_from_elsewhere(new_browser, page):
    visitor = Visitor(new_browser(), page[0])
    visitor.ask()
    events = [json.loads(entry["message"])["message"] for entry in visitor.browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    asked = {url for url in urls if url.startswith(("http", "ws"))}
    assert len(asked) > 10
    assert {url for url in asked if not url.startswith(page[0])} == set()


def test_honest_words(visitor):
    notes = visitor.one("#notes").text
    for phrase in ("where the model attends", "answers need the latents", "nonsense"):
        assert phrase in " ".join(notes.split())
