"""The page in a real browser: Debian's chromium, driven by selenium, on this machine alone."""

import json
import shutil
import time

import pytest

pytestmark = pytest.mark.slow
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from cumulant.serving.http.service import Limits  # noqa: E402

from .common import build  # noqa: E402
from .conftest import Running  # noqa: E402

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def server():
    model = build()
    model.generation_config.suppress_tokens = [256, 257, 258]  # nothing ends a reply
    running = Running({"small": model}, limits=Limits(max_tokens=10**6))
    yield running
    running.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield browser
    browser.quit()


@pytest.fixture(params=[(size, theme) for size in SIZES for theme in ("light", "dark")])
def page(driver, server, request, tmp_path):
    size, theme = request.param
    width, height = SIZES[size]
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )
    driver.get(server.url)
    wait(lambda: driver.find_elements(By.CSS_SELECTOR, "#model option"))
    yield driver
    assert [line for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def element(page, name):
    return page.find_element(By.ID, name)


def press(page, *keys):
    """Keys for whatever has the focus."""
    webdriver.ActionChains(page).send_keys(*keys).perform()


def idle(page):
    wait(lambda: element(page, "send").is_enabled())


def contrast(page, selector):
    """The ratio of WCAG between an element's text and what is behind it."""
    found = page.execute_script(
        """
        const element = document.querySelector(arguments[0]);
        let behind = element, colour = "rgba(0, 0, 0, 0)";
        while (behind && colour === "rgba(0, 0, 0, 0)") {
          colour = getComputedStyle(behind).backgroundColor;
          behind = behind.parentElement;
        }
        return [getComputedStyle(element).color, colour];
        """,
        selector,
    )
    light = []
    for text in found:
        values = [int(float(x)) / 255 for x in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_it_fits_and_can_be_read(page):
    wide = page.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide[0] <= wide[1]
    for selector in ("h1", "label[for=prompt]", "#send", ".note", "dt", "dd", "#prompt"):
        assert contrast(page, selector) >= 4.5, selector
    unnamed = page.execute_script(
        """
        return [...document.querySelectorAll("input, select, textarea, button")]
          .filter((e) => !(e.labels && e.labels.length) && !e.textContent.trim())
          .map((e) => e.id);
        """
    )
    assert unnamed == []


def test_completing_and_chatting(page):
    element(page, "seed").send_keys("3")
    element(page, "max_tokens").clear()
    element(page, "max_tokens").send_keys("20")
    element(page, "prompt").send_keys("Once upon a time")
    element(page, "send").click()
    idle(page)
    turn = page.find_element(By.CSS_SELECTOR, "#log .turn span")
    assert turn.get_attribute("textContent").startswith("Once upon a time")
    assert element(page, "read").text == "16 tokens"
    assert element(page, "state").text != "–"
    assert element(page, "problem").text == ""
    page.find_element(By.CSS_SELECTOR, "[value=chat]").click()
    for text in ("Hello", "And again"):
        element(page, "prompt").send_keys(text)
        element(page, "send").click()
        idle(page)
    names = [e.text for e in page.find_elements(By.CSS_SELECTOR, "#log .who")]
    assert names == ["Continued", "You", "Model", "You", "Model"]
    assert "%" in element(page, "cached").text
    element(page, "clear").click()
    assert page.find_elements(By.CSS_SELECTOR, "#log .turn") == []


def test_a_document_and_an_error(page, tmp_path):
    (tmp_path / "text.txt").write_text("A long text. " * 40)
    element(page, "file").send_keys(str(tmp_path / "text.txt"))
    wait(lambda: "520 tokens" in element(page, "document").text)
    element(page, "prompt").send_keys("?")
    element(page, "max_tokens").clear()
    element(page, "max_tokens").send_keys("5")
    element(page, "send").click()
    idle(page)
    assert element(page, "read").text == "521 tokens"
    assert element(page, "cached").text in ("520 (99%)", "521 (100%)")
    element(page, "forget").click()
    wait(lambda: element(page, "document").text == "No document.")
    page.execute_script("document.getElementById('temperature').value = -1")
    element(page, "prompt").send_keys("x")
    page.execute_script("send()")
    wait(lambda: "temperature" in element(page, "problem").text)
    page.get_log("browser")  # the refused request is in it


def test_with_keys_alone(page):
    page.execute_script("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        press(page, Keys.TAB)
        active = page.switch_to.active_element
        seen.append(active.get_attribute("id") or active.get_attribute("value"))
        if active.get_attribute("id") == "prompt":
            break
    assert "text" in seen
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    press(page, "abc")
    keys = webdriver.ActionChains(page).key_down(Keys.CONTROL).send_keys(Keys.ENTER)
    keys.key_up(Keys.CONTROL).perform()
    idle(page)
    assert wait(lambda: page.find_elements(By.CSS_SELECTOR, "#log .turn"))
    for _ in range(30):
        active = page.switch_to.active_element
        if active.get_attribute("id") == "key":
            break
        press(page, Keys.TAB)
    assert active.get_attribute("id") == "key"


def test_a_stream_can_be_stopped(page, server):
    element(page, "max_tokens").clear()
    element(page, "max_tokens").send_keys("1000000")
    element(page, "prompt").send_keys("x")
    element(page, "send").click()
    wait(lambda: element(page, "stop").is_enabled())
    element(page, "stop").click()
    idle(page)
    wait(lambda: server.engine.counters.rows == 0)
    assert element(page, "problem").text == ""


def test_pictures(page, request, tmp_path_factory):
    """For people: --basetemp keeps them."""
    element(page, "prompt").send_keys("Once upon a time")
    element(page, "send").click()
    idle(page)
    name = json.dumps(request.node.callspec.id).strip('"')
    target = tmp_path_factory.mktemp("pictures") / f"{name}.png"
    height = page.execute_script("return document.documentElement.scrollHeight")
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": page.execute_script("return innerWidth"), "height": height,
         "deviceScaleFactor": 1, "mobile": False},
    )  # fmt: skip
    assert page.get_screenshot_as_file(str(target))
