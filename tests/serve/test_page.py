"""The page, in a real browser: what a person sees and does there.

What a healthy gateway does not do on demand (a full queue, a server that is away) is put in its place by the browser,
in the words of the HTTP API; all else is the gateway's.
"""

import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Route,
    expect,
)

from tests.chromium import chromium
from tests.serve.command import serve_command

pytestmark = pytest.mark.asyncio(loop_scope="module")

RESULTS = Path(__file__).parents[2] / "results"
"""Where screenshots are kept."""

_TIMEOUT_MS = 60_000  # a browser and a cluster share the processors

expect.set_options(timeout=_TIMEOUT_MS)

RECEIPT = {
    "slot": 1,
    "actor": "3f2a91c0d4e5b6a7f809",
    "node": "node-b",
    "why": "least-loaded",
    "queue_ms": 0.3,
    "attempts": 1,
    "usage": {"prompt_tokens": 24, "completion_tokens": 3},
    "engine": "simulated",
    "engine_version": "0.1.0",
    "model": "simulated",
}


@pytest.fixture(scope="module")
def page_url() -> Iterator[str]:
    """The page of two gateways that serve the simulated engine in two slots, and the small model."""
    simulated = {"kind": "simulated", "tokens_per_s": 50, "replicas": 2}
    small = {"kind": "openvino", "path": "smollm2-135m-instruct"}
    models = [{"name": "simulated", "engines": [simulated]}, {"name": "smollm2-135m-instruct", "engines": [small]}]
    with serve_command({"models": models, "gateway": {"replicas": 2}}) as command:
        yield f"{command.url}/"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """The browser of these tests."""
    async with chromium() as browser:
        yield browser


class Tab:
    """A browser tab with the page in it, in a profile of its own."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.refusals_expected = False
        page.set_default_timeout(_TIMEOUT_MS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        self.message = page.get_by_label("Message", exact=True)
        self.stop = page.get_by_role("button", name="Stop")
        self.sessions = page.get_by_role("list", name="Sessions of this browser tab").get_by_role("button")
        self.log = page.get_by_role("log")
        self.answers = self.log.locator(".answer")

    def _on_console(self, message: ConsoleMessage) -> None:
        # The browser itself logs every response above 399, and every request that got none.
        if message.type in {"error", "warning"} and not (
            self.refusals_expected and message.text.startswith("Failed to load resource")
        ):
            self.complaints.append(message.text)

    @property
    def answer(self) -> Locator:
        """The latest answer."""
        return self.answers.last

    @property
    def receipt(self) -> Locator:
        """The latest answer's receipt."""
        return self.answer.locator(".receipt")

    @property
    def text(self) -> Locator:
        """The latest answer's text."""
        return self.answer.locator(".text")

    async def open(self) -> None:
        """Load the page and wait until it is live."""
        await self.page.goto(self.url)
        await expect(self.page.get_by_text("live", exact=True)).to_be_attached()

    async def setting(self, name: str, value: str) -> None:
        """Fill in a generation parameter."""
        await self.page.get_by_label(name).fill(value)

    async def send(self, text: str) -> None:
        """Send a message."""
        await self.message.fill(text)
        await self.message.press("Enter")

    async def ask(self, text: str) -> str:
        """Send a message and return the whole answer."""
        before = await self.answers.count()
        await self.send(text)
        await expect(self.answers).to_have_count(before + 1)
        await expect(self.answer).not_to_have_attribute("aria-busy", "true")
        return await self.text.inner_text()

    async def back_to(self, control: Locator) -> None:
        """Move the focus backwards, by keyboard, until it is at a control."""
        for _ in range(40):
            await self.page.keyboard.press("Shift+Tab")
            if await control.evaluate("node => node === document.activeElement"):
                return
        pytest.fail(f"the focus does not get to {control}")

    async def call(self, method: str, path: str) -> tuple[int, Any]:
        """Call the gateway from beside the page; return status and JSON."""
        response = await self.page.context.request.fetch(self.url + path, method=method, timeout=_TIMEOUT_MS)
        return response.status, await response.json()

    async def session_id(self) -> str:
        """Return the id of the session in front."""
        stored = json.loads(await self.page.evaluate("sessionStorage.getItem('raylm.sessions')"))
        return next(one["id"] for one in stored if one["current"])

    async def answer_with(self, *events: dict[str, Any], error: dict[str, Any] | None = None) -> None:
        """Have the next turns answered with these events, and then an error."""
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        if error is not None:
            lines.append(f"event: error\ndata: {json.dumps({'error': error})}\n\n")

        async def answer(route: Route) -> None:
            await route.fulfill(content_type="text/event-stream", body="".join(lines))

        await self.page.route("**/stream_chat", answer)

    async def change_state(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Have the state changed on its way to the page."""

        async def answer(route: Route) -> None:
            state = await (await route.fetch()).json()
            change(state)
            await route.fulfill(json=state)

        await self.page.route("**/state", answer)


StartTab = Callable[..., Awaitable[Tab]]


@pytest_asyncio.fixture(loop_scope="module")
async def start_tab(browser: Browser, page_url: str) -> AsyncIterator[StartTab]:
    """Opens tabs; after the test none may have complained, or asked another origin for anything."""
    tabs: list[Tab] = []
    contexts: list[BrowserContext] = []

    async def start(*, load: bool = True, width: int = 1360, height: int = 800, **options: Any) -> Tab:
        context = await browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        tab = Tab(await context.new_page(), page_url)
        tabs.append(tab)
        if load:
            await tab.open()
        return tab

    yield start
    for tab in tabs:
        await tab.page.unroute_all(behavior="ignoreErrors")
    for context in contexts:
        await context.close()
    for tab in tabs:
        assert tab.complaints == []
        assert {urlsplit(url).netloc for url in tab.requests} == {urlsplit(page_url).netloc}


@pytest_asyncio.fixture(loop_scope="module")
async def tab(start_tab: StartTab) -> Tab:
    """A tab with the page, on a wide screen."""
    return await start_tab()


async def grown(text: Locator, than: int) -> int:
    """Wait until a text is longer than so many characters; return how long it is."""
    await expect(text).to_have_text(re.compile(rf"[\s\S]{{{than + 1},}}"))
    return len(await text.inner_text())


async def test_an_answer_streams_in(tab: Tab) -> None:
    """An answer's text is there, and grows, while the model still writes."""
    await tab.setting("max_new_tokens", "100")
    await tab.ask("Tell me something.")
    await expect(tab.receipt).to_contain_text("100 out")
    await tab.setting("max_new_tokens", "5000")
    await tab.send("Tell me something long.")
    await expect(tab.answers).to_have_count(2)
    first = await grown(tab.text, 0)
    await expect(tab.answer).to_have_attribute("aria-busy", "true")
    await grown(tab.text, first)
    await tab.message.press("Escape")
    await expect(tab.stop).to_be_hidden()


async def test_an_answer_has_its_receipt(tab: Tab) -> None:
    """The receipt names slot, actor, node, reason, queue, attempts, tokens and rate."""
    await tab.setting("max_new_tokens", "20")
    await tab.ask("Hello")
    for part in ("slot ", "actor ", "node ", "pinned", "queued ", "attempts 1", " in, 20 out", "tok/s"):
        await expect(tab.receipt).to_contain_text(part)


async def test_a_simulated_answer_says_so(tab: Tab) -> None:
    """The clock is called simulated, at its answer and at its slot."""
    await tab.page.get_by_label("Model").select_option("simulated")
    await tab.setting("max_new_tokens", "5")
    await tab.ask("Hello")
    await expect(tab.receipt).to_contain_text("simulated")
    slots = tab.page.get_by_role("region", name="simulated", exact=True).locator(".slot")
    await expect(slots.first).to_contain_text("simulated")


async def test_a_model_answers(tab: Tab) -> None:
    """What a language model says is what is shown, and the receipt names its engine."""
    await tab.page.get_by_label("Model").select_option("smollm2-135m-instruct")
    await tab.setting("max_new_tokens", "24")
    await tab.setting("temperature", "0")
    assert "Paris" in await tab.ask("What is the capital of France?")
    await expect(tab.receipt).to_contain_text("openvino")


async def test_the_second_turn_continues_the_session(tab: Tab) -> None:
    """Two turns are one session at the gateway, on the slot that it is pinned to."""
    await tab.setting("max_new_tokens", "10")
    first = await tab.ask("One")
    second = await tab.ask("Two")
    await expect(tab.receipt).to_contain_text("pinned")
    status, session = await tab.call("GET", f"sessions/{await tab.session_id()}")
    assert status == 200
    assert [(message["role"], message["content"].strip()) for message in session["messages"]] == [
        ("user", "One"),
        ("assistant", first.strip()),
        ("user", "Two"),
        ("assistant", second.strip()),
    ]


async def test_the_system_prompt_opens_the_session(tab: Tab) -> None:
    """The system prompt is the session's first message, once, and can then no longer be changed."""
    system = tab.page.get_by_label("System prompt")
    await system.fill("Answer in one word.")
    await tab.setting("max_new_tokens", "5")
    await tab.ask("One")
    await tab.ask("Two")
    _, session = await tab.call("GET", f"sessions/{await tab.session_id()}")
    assert [message["role"] for message in session["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    await expect(system).not_to_be_editable()


async def test_settings_reach_the_gateway(tab: Tab) -> None:
    """Every generation parameter that is filled in is sent by its name, and no other."""
    values = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "seed": 3}
    for name, value in values.items():
        await tab.setting(name, str(value))
    await tab.setting("stop_words", "END\nSTOP")
    async with tab.page.expect_request("**/stream_chat") as sent:
        await tab.ask("Hello")
    body = (await sent.value).post_data_json
    for name in ("session_id", "request_id", "model"):
        assert body.pop(name)
    turn = {"inputs": "Hello", "sequence_start": True, "sequence_end": False}
    assert body == {**turn, **values, "stop_words": ["END", "STOP"]}


async def test_a_wrong_setting_is_pointed_at(tab: Tab) -> None:
    """A value out of range is not sent; its field has the focus."""
    await tab.setting("top_p", "7")
    await tab.send("Hello")
    await expect(tab.page.get_by_label("top_p")).to_be_focused()
    await expect(tab.message).to_have_value("Hello")
    await expect(tab.answers).to_have_count(0)


async def test_a_fork_goes_its_own_way(tab: Tab) -> None:
    """A fork begins with the conversation so far; what is said in it is not said in the other."""
    await tab.setting("max_new_tokens", "10")
    said = await tab.ask("Begin")
    await tab.page.get_by_role("button", name="Fork", exact=True).click()
    await expect(tab.sessions).to_have_count(2)
    await expect(tab.text).to_have_text(said.strip())
    await tab.ask("Only in the fork")
    _, fork = await tab.call("GET", f"sessions/{await tab.session_id()}")
    assert [message["content"] for message in fork["messages"] if message["role"] == "user"] == [
        "Begin",
        "Only in the fork",
    ]
    await tab.sessions.first.click()
    await expect(tab.log).not_to_contain_text("Only in the fork")
    _, origin = await tab.call("GET", f"sessions/{await tab.session_id()}")
    assert len(origin["messages"]) == 2


async def test_two_sessions_stream_side_by_side(tab: Tab) -> None:
    """An answer goes on while another session is in front."""
    await tab.setting("max_new_tokens", "60")
    await tab.send("First")
    await grown(tab.text, 0)
    await tab.page.get_by_role("button", name="New", exact=True).click()
    await expect(tab.answers).to_have_count(0)
    await tab.ask("Second")
    await tab.sessions.first.click()
    await expect(tab.log).to_contain_text("First")
    await expect(tab.receipt).to_contain_text("60 out")


async def test_an_ended_session_is_forgotten(tab: Tab) -> None:
    """End makes the gateway forget the session, and nothing more can be said in it."""
    await tab.setting("max_new_tokens", "5")
    await tab.ask("Hello")
    session_id = await tab.session_id()
    await tab.page.get_by_role("button", name="End", exact=True).click()
    await expect(tab.log).to_contain_text("Session ended")
    await expect(tab.message).to_be_disabled()
    status, _ = await tab.call("GET", f"sessions/{session_id}")
    assert status == 404
    await tab.page.get_by_role("button", name="Close", exact=True).click()
    await expect(tab.message).to_be_enabled()
    await tab.ask("Hello again")


async def test_a_session_that_the_gateway_closed(tab: Tab) -> None:
    """Status -2 has its own words, and a way to go on."""
    await tab.setting("max_new_tokens", "5")
    await tab.ask("Hello")
    await tab.call("DELETE", f"sessions/{await tab.session_id()}")
    await tab.ask("Still there?")
    await expect(tab.answer).to_contain_text("The session is closed")
    await tab.page.get_by_role("button", name="Send in a new session").click()
    await expect(tab.log).to_contain_text("Still there?")
    await expect(tab.receipt).to_contain_text("5 out")
    await expect(tab.sessions).to_have_count(2)


async def test_a_conversation_that_is_too_long(tab: Tab) -> None:
    """Status -3 has its own words, and the session goes on as it was."""
    await tab.setting("max_new_tokens", "5")
    await tab.ask("Hello")
    await tab.ask("word " * 12_000)
    await expect(tab.answer).to_contain_text("The conversation is too long")
    await tab.ask("Shorter")
    await expect(tab.receipt).to_contain_text("pinned")


async def test_escape_stops(tab: Tab) -> None:
    """Escape ends the answer in the engine; the text that had come stays, and the session goes on."""
    await tab.page.get_by_label("Model").select_option("simulated")
    await tab.setting("max_new_tokens", "5000")
    await tab.send("Count to a million")
    await grown(tab.text, 0)
    running = tab.page.get_by_role("region", name="simulated", exact=True).locator(".counts dd").first
    await expect(running).not_to_have_text("0")
    await tab.message.press("Escape")
    await expect(tab.stop).to_be_hidden()
    await expect(tab.receipt).to_contain_text("stopped")
    await grown(tab.text, 0)
    await expect(running).to_have_text("0")
    await tab.setting("max_new_tokens", "5")
    await tab.ask("Go on")
    await expect(tab.receipt).to_contain_text("5 out")


async def test_the_stop_button_stops(tab: Tab) -> None:
    """The button that takes Send's place stops, and gives the place back."""
    await tab.page.get_by_label("Model").select_option("simulated")
    await tab.setting("max_new_tokens", "5000")
    await tab.message.fill("Count to a million")
    await tab.page.get_by_role("button", name="Send", exact=True).click()
    await expect(tab.message).to_be_focused()
    await grown(tab.text, 0)
    await tab.stop.click()
    await expect(tab.receipt).to_contain_text("stopped")
    await expect(tab.message).to_be_focused()
    await expect(tab.page.get_by_role("button", name="Send", exact=True)).to_be_visible()


async def test_keyboard_alone(tab: Tab) -> None:
    """Skip link, new line, send and the way to another control need no mouse, and the focus is seen."""
    await tab.setting("max_new_tokens", "5")
    await tab.back_to(tab.page.get_by_role("link", name="Skip to the message box"))
    await tab.page.keyboard.press("Enter")
    await expect(tab.message).to_be_focused()
    await tab.page.keyboard.type("Two")
    await tab.page.keyboard.press("Shift+Enter")
    await tab.page.keyboard.type("lines")
    await tab.page.keyboard.press("Enter")
    await expect(tab.log.locator(".question .text")).to_have_text("Two\nlines", use_inner_text=True)
    await expect(tab.receipt).to_contain_text("5 out")
    fork = tab.page.get_by_role("button", name="Fork", exact=True)
    await tab.back_to(fork)
    await expect(fork).to_have_css("outline-style", "solid")
    await tab.page.keyboard.press("Enter")
    await expect(tab.sessions).to_have_count(2)
    await expect(tab.message).to_be_focused()


async def test_a_reload_keeps_the_sessions(tab: Tab) -> None:
    """After a reload the tab has its sessions again, as the gateway remembers them, and goes on with them."""
    await tab.setting("max_new_tokens", "5")
    said = await tab.ask("Remember me")
    await tab.page.reload()
    await expect(tab.page.get_by_text("live", exact=True)).to_be_visible()
    await expect(tab.log).to_contain_text("Remember me")
    await expect(tab.text).to_have_text(said.strip())
    await tab.ask("And on")
    await expect(tab.receipt).to_contain_text("pinned")


@pytest.mark.parametrize(("scheme", "other"), [("dark", "light"), ("light", "dark")])
async def test_themes(start_tab: StartTab, scheme: str, other: str) -> None:
    """The page follows the system's scheme until the other is chosen, and then keeps to that."""
    tab = await start_tab(color_scheme=scheme)
    root = tab.page.locator(":root")
    by_system = await tab.page.locator("body").evaluate("node => getComputedStyle(node).backgroundColor")
    await tab.page.get_by_role("button", name="Dark theme").click()
    await expect(root).to_have_css("color-scheme", other)
    await expect(tab.page.locator("body")).not_to_have_css("background-color", by_system)
    await tab.page.reload()
    await expect(root).to_have_css("color-scheme", other)


_CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => colour.slice(0, 3)
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba("white");
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!hasText || !node.checkVisibility() || node.matches(":disabled, :disabled *")) continue;
    const [high, low] = [luminance(rgba(getComputedStyle(node).color)), luminance(behind(node))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${node.outerHTML.slice(0, 80)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_text_has_contrast(start_tab: StartTab, scheme: str) -> None:
    """Every text stands out by 4.5 to 1, WCAG's level AA, errors and slots in trouble included."""
    tab = await start_tab(color_scheme=scheme)

    def trouble(state: dict[str, Any]) -> None:
        slots = state["models"][0]["slots"]
        state["models"][0]["slots"] = [
            {**slots[0], "slot": number, "state": name, "num_deaths": number}
            for number, name in enumerate(("up", "starting", "suspected", "down", "failed"))
        ]
        state["models"][0]["failures"] = [
            {"at": 1.8e9, "type": "EngineError", "message": "it failed", "request_id": "1"}
        ]

    await tab.change_state(trouble)
    await tab.answer_with({"status": 0, "text": "Hi", "n_tokens": 3, "receipt": {**RECEIPT, "why": "moved:died"}})
    await tab.ask("Hello")
    await tab.page.unroute("**/stream_chat")
    await tab.answer_with(error={"message": "out of memory", "type": "EngineError", "param": None, "code": 500})
    await tab.ask("Hello")
    await tab.page.unroute("**/stream_chat")
    await tab.answer_with({"status": -3, "text": "", "n_tokens": 0})
    await tab.ask("Hello")
    await expect(tab.page.get_by_text("suspected")).to_be_visible()
    assert await tab.page.evaluate(_CONTRASTS) == []


@pytest.mark.parametrize("width", [360, 600, 900, 1360, 2200])
async def test_no_width_scrolls_sideways(start_tab: StartTab, width: int) -> None:
    """From a narrow telephone to a wide screen nothing is cut off, whatever the model writes."""
    tab = await start_tab(width=width)
    wide = "x" * 300
    receipt = {**RECEIPT, "why": "moved:silent", "node": wide}
    await tab.answer_with({"status": 0, "text": f"{wide}\n\n```\n{wide}\n```", "n_tokens": 3, "receipt": receipt})
    await tab.ask(wide)
    await expect(tab.receipt).to_contain_text("moved:silent")
    for view in ("Settings", "Cluster", "Chat"):
        button = tab.page.get_by_role("button", name=view, exact=True)
        if await button.is_visible():
            await button.click()
        wider = "[document.documentElement, ...document.querySelectorAll('.panel, .log, .composer, .bar')]"
        assert (
            await tab.page.evaluate(f"{wider}.filter(n => n.scrollWidth > n.clientWidth).map(n => n.className)") == []
        )


@pytest.mark.parametrize("width", [360, 1360])
@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_screenshots(start_tab: StartTab, scheme: str, width: int) -> None:
    """A picture of the page in the middle of an answer is kept with the results of the run."""
    tab = await start_tab(color_scheme=scheme, width=width)
    if width == 360:
        await tab.page.get_by_role("button", name="Settings").click()
    await tab.setting("max_new_tokens", "40")
    if width == 360:
        await tab.page.get_by_role("button", name="Chat", exact=True).click()
    await tab.ask("What is a cluster?")
    await tab.send("And what is a slot?")
    await grown(tab.text, 0)
    RESULTS.mkdir(exist_ok=True)
    await tab.page.screenshot(path=RESULTS / f"page-{scheme}-{width}.png")


async def test_an_error_in_mid_stream(tab: Tab) -> None:
    """A failure after some text says what happened and what to do; the text stays."""
    error = {"message": "the engine ran out of memory", "type": "EngineError", "param": None, "code": 500}
    await tab.answer_with({"status": 1, "text": "Half an ans", "n_tokens": 3}, error=error)
    await tab.ask("Hello")
    await expect(tab.text).to_have_text("Half an ans")
    for part in ("EngineError", "the engine ran out of memory", "Try again in a moment", "not part of the session"):
        await expect(tab.answer).to_contain_text(part)
    await tab.page.unroute("**/stream_chat")
    await tab.setting("max_new_tokens", "5")
    await tab.page.get_by_role("button", name="Try again").click()
    await expect(tab.message).to_be_focused()
    await expect(tab.receipt).to_contain_text("5 out")


async def test_a_stream_that_is_cut_off(tab: Tab) -> None:
    """A stream without an end is not taken for an answer."""
    await tab.answer_with({"status": 1, "text": "Half an ans", "n_tokens": 3})
    await tab.ask("Hello")
    await expect(tab.answer).to_contain_text("The connection ended before the answer did.")
    await expect(tab.text).to_have_text("Half an ans")


async def test_a_full_queue(tab: Tab) -> None:
    """A refusal says when to come again."""
    tab.refusals_expected = True
    error = {"message": "128 requests wait already", "type": "PoolSaturatedError", "param": None, "code": 429}

    async def refuse(route: Route) -> None:
        await route.fulfill(status=429, headers={"Retry-After": "3"}, json={"error": error})

    await tab.page.route("**/stream_chat", refuse)
    await tab.ask("Hello")
    await expect(tab.answer).to_contain_text("128 requests wait already")
    await expect(tab.answer).to_contain_text("Try again in 3 s.")


async def test_an_answer_outlives_its_actor(tab: Tab) -> None:
    """When the actor dies the text goes on to its end, the answer says that it has moved, and the slot that it died."""
    await tab.setting("max_new_tokens", "1000")  # 20 s
    async with tab.page.expect_response("**/stream_chat") as begun:
        await tab.send("Outlive your actor")
    number = int((await begun.value).headers["x-raylm-slot"])
    await grown(tab.text, 0)
    _, state = await tab.call("GET", "state")
    slots = next(model["slots"] for model in state["models"] if model["name"] == "simulated")
    os.kill(next(slot["pid"] for slot in slots if slot["slot"] == number), signal.SIGKILL)
    await expect(tab.receipt).to_contain_text("moved:died")
    await expect(tab.receipt).to_contain_text("1000 out")
    await expect(tab.answer).to_contain_text("Moved: its actor died")
    slot = tab.page.get_by_role("region", name="simulated", exact=True).locator(".slot").nth(number)
    await expect(slot).to_contain_text("death")


async def test_a_move_is_explained(tab: Tab) -> None:
    """An answer that has moved says why, and which slot went on with it."""
    receipt = {**RECEIPT, "why": "moved:died", "attempts": 2}
    await tab.answer_with({"status": 0, "text": "Whole", "n_tokens": 3, "receipt": receipt})
    await tab.ask("Hello")
    await expect(tab.answer).to_contain_text("Moved: its actor died; slot 1 took the answer up where it was.")
    await expect(tab.receipt).to_contain_text("moved:died")
    await expect(tab.receipt).to_contain_text("attempts 2")


async def test_a_models_text_is_only_text(tab: Tab) -> None:
    """Markup from a model is shown and not obeyed; fenced code is set as code."""
    text = "<img src=/static/icon.svg>\n\n```python\nprint('<b>1</b>')\n```\n\nDone"
    await tab.answer_with({"status": 0, "text": text, "n_tokens": 3, "receipt": RECEIPT})
    await tab.ask("Hello")
    await expect(tab.text.locator("p")).to_have_text(["<img src=/static/icon.svg>", "Done"])
    await expect(tab.text.locator("pre")).to_have_text("print('<b>1</b>')")
    await expect(tab.text.locator("img, b")).to_have_count(0)


async def test_scrolling_away_is_respected(start_tab: StartTab) -> None:
    """A growing answer stays in view, but not against a reader who has scrolled up."""
    tab = await start_tab(width=1240, height=420)
    await tab.page.get_by_label("Model").select_option("simulated")
    await tab.setting("max_new_tokens", "5000")
    await tab.send("Count to a million")
    await grown(tab.text, 800)  # more than fits
    assert await tab.log.evaluate("node => node.scrollTop") > 60
    assert await tab.log.evaluate("node => node.scrollHeight - node.scrollTop - node.clientHeight") < 32
    latest = tab.page.get_by_role("button", name="Latest")
    await expect(latest).to_be_hidden()
    await tab.log.evaluate("node => node.scrollTo(0, 0)")
    await expect(latest).to_be_visible()
    await grown(tab.text, len(await tab.text.inner_text()))
    assert await tab.log.evaluate("node => node.scrollTop") == 0
    await latest.click()
    await expect(latest).to_be_hidden()
    await tab.message.press("Escape")
    await expect(tab.stop).to_be_hidden()


async def test_a_screen_reader_hears_the_whole_answer_once(tab: Tab) -> None:
    """The live region speaks when an answer begins and when it is complete, not at every token."""
    await tab.setting("max_new_tokens", "40")
    await tab.page.evaluate(
        """() => {
          window.heard = [];
          const region = document.getElementById("announcer");
          new MutationObserver(() => window.heard.push(region.textContent)).observe(region, { childList: true });
        }"""
    )
    said = await tab.ask("Hello")
    heard = await tab.page.evaluate("window.heard")
    assert [part.split(":")[0] for part in heard] == ["Answering", "Answer"]
    assert heard[1].split() == ["Answer:", *said.split()]
    await expect(tab.log).to_have_attribute("aria-live", "off")


async def test_the_clusters_state_is_live(tab: Tab) -> None:
    """Each slot shows its state, actor, node and load; what is generated shows in rate, chart and counts."""
    await tab.page.get_by_label("Model").select_option("simulated")
    model = tab.page.get_by_role("region", name="simulated", exact=True)
    slot = model.locator(".slot").first
    for part in ("up", "running", "tokens due", "actor ", "pid "):
        await expect(slot).to_contain_text(part)
    await tab.setting("max_new_tokens", "5000")
    await tab.send("Count to a million")
    await expect(model.locator(".total")).not_to_have_text("0.0 tok/s")
    await expect(model.locator(".chart path").first).to_have_attribute("d", re.compile("M.*Z"))
    await expect(model.locator(".counts div", has_text="running").locator("dd")).not_to_have_text("0")
    await tab.message.press("Escape")
    await expect(tab.stop).to_be_hidden()


async def test_the_chart_is_read_with_keys(tab: Tab) -> None:
    """The rate at each moment is told without a pointer."""
    chart = tab.page.get_by_role("region", name="simulated", exact=True).get_by_role("slider")
    await expect(chart.locator(".readout")).to_have_text("")
    await chart.focus()
    await expect(chart).to_have_attribute("aria-valuetext", re.compile(r"^0 s ago: "))
    await expect(chart).to_have_attribute("aria-valuenow", "0")
    await tab.page.keyboard.press("ArrowLeft")
    await expect(chart).to_have_attribute("aria-valuenow", "1")
    await tab.page.keyboard.press("Home")
    await expect(chart).to_have_attribute("aria-valuenow", "120")
    await tab.message.focus()
    await expect(chart.locator(".readout")).to_have_text("")


async def test_slots_in_trouble(tab: Tab) -> None:
    """A slot that is down shows so, failures are listed, and the chat warns that a message will wait."""

    def trouble(state: dict[str, Any]) -> None:
        for model in state["models"]:
            model["failures"] = [{"at": 1.8e9, "type": "EngineError", "message": "CUDA error", "request_id": "1"}]
            for slot in model["slots"]:
                slot |= {"state": "down", "num_deaths": 2}

    await tab.change_state(trouble)
    await expect(tab.page.locator(".slot").first).to_contain_text("down")
    await expect(tab.page.locator(".slot").first).to_contain_text("2 deaths")
    for part in ("CUDA error", "Request 1"):
        await expect(tab.page.locator(".failures").first).to_contain_text(part)
    await expect(tab.page.locator("#advice")).to_contain_text("A message waits until one is.")


async def test_a_model_without_actors(tab: Tab) -> None:
    """A model that is scaled to none has not failed."""

    def scaled(state: dict[str, Any]) -> None:
        for model in state["models"]:
            model["slots"] = []

    await tab.change_state(scaled)
    await expect(tab.page.locator("#advice")).to_contain_text("no actor at present")


async def test_focus_when_an_answer_ends(tab: Tab) -> None:
    """Who has the focus at Stop when there is nothing to stop any more has it at the message box."""
    await tab.setting("max_new_tokens", "20")
    await tab.send("Hello")
    await tab.stop.focus()
    await expect(tab.receipt).to_contain_text("20 out")
    await expect(tab.message).to_be_focused()


async def test_no_models(start_tab: StartTab) -> None:
    """A server without models says so, and nothing can be sent."""
    tab = await start_tab(load=False)
    await tab.page.route("**/state", lambda route: route.fulfill(json={"models": []}))
    await tab.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": []}))
    await tab.open()
    await expect(tab.page.get_by_text("No models.")).to_be_visible()
    await tab.message.fill("Hello")
    await expect(tab.page.get_by_role("button", name="Send", exact=True)).to_be_disabled()


async def test_a_server_that_is_away(tab: Tab) -> None:
    """A server that cannot be reached is told from one that fails, what was known stays, and the page finds back."""
    tab.refusals_expected = True
    await tab.setting("max_new_tokens", "5")
    await tab.page.context.set_offline(True)
    await expect(tab.page.get_by_text("server unreachable")).to_be_visible()
    await expect(tab.page.locator(".slot").first).to_be_visible()
    await tab.ask("Hello")
    await expect(tab.answer).to_contain_text("Check that the server is running")
    await tab.page.context.set_offline(False)
    await expect(tab.page.get_by_text("live", exact=True)).to_be_visible()
    await tab.page.get_by_role("button", name="Try again").click()
    await expect(tab.message).to_be_focused()
    await expect(tab.receipt).to_contain_text("5 out")


async def test_a_hidden_tab_asks_for_nothing(tab: Tab) -> None:
    """The state is not asked for while the tab is not in sight, and again at once when it is."""
    await tab.page.clock.install()
    await tab.page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    await tab.page.clock.run_for(2_000)  # a question that was due before may still go out
    num_requests = len(tab.requests)
    await tab.page.clock.run_for(60_000)
    assert len(tab.requests) == num_requests
    async with tab.page.expect_request("**/state"):
        await tab.page.evaluate(
            """() => {
              delete document.hidden;
              document.dispatchEvent(new Event("visibilitychange"));
            }"""
        )


async def test_an_api_key_is_asked_for(start_tab: StartTab) -> None:
    """A server that wants a key is told it as a bearer token, and it is kept for this tab alone."""
    tab = await start_tab(load=False)
    tab.refusals_expected = True
    error = {"message": "the API key is missing or wrong", "type": "AuthenticationError", "param": None, "code": 401}

    async def guard(route: Route) -> None:
        path = urlsplit(route.request.url).path
        given = route.request.headers.get("authorization")
        if path == "/" or path.startswith("/static/") or given == "Bearer right":
            await route.continue_()
        else:
            await route.fulfill(status=401, json={"error": error})

    await tab.page.route("**/*", guard)
    await tab.page.goto(tab.url)
    dialog = tab.page.get_by_role("dialog", name="API key")
    await dialog.get_by_label("Key", exact=True).fill("wrong")
    await tab.page.keyboard.press("Enter")
    await expect(dialog).to_contain_text("did not accept")
    await dialog.get_by_label("Key", exact=True).fill("right")
    await dialog.get_by_role("button", name="Use this key").click()
    await expect(dialog).to_be_hidden()
    await expect(tab.page.get_by_text("live", exact=True)).to_be_visible()
    await tab.setting("max_new_tokens", "5")
    await tab.ask("Hello")
    await expect(tab.receipt).to_contain_text("5 out")
    assert await tab.page.evaluate("[sessionStorage.getItem('raylm.key'), localStorage.length]") == ["right", 0]


async def test_without_a_key_the_page_says_so(start_tab: StartTab) -> None:
    """Who closes the dialog is not asked again by a timer, and finds a button that asks."""
    tab = await start_tab(load=False)
    tab.refusals_expected = True
    error = {"message": "the API key is missing or wrong", "type": "AuthenticationError", "param": None, "code": 401}
    await tab.page.route("**/state", lambda route: route.fulfill(status=401, json={"error": error}))
    await tab.page.goto(tab.url)
    dialog = tab.page.get_by_role("dialog", name="API key")
    await expect(dialog).to_be_visible()
    await tab.page.keyboard.press("Escape")
    await expect(tab.page.get_by_text("API key needed")).to_be_visible()
    async with tab.page.expect_request("**/state"):
        pass
    await expect(dialog).to_be_hidden()
    await tab.page.get_by_role("button", name="Enter a key").click()
    await expect(dialog).to_be_visible()


async def test_events_may_be_cut_anywhere(tab: Tab) -> None:
    """Events are the same however the network cuts their bytes, in the middle of a letter too."""
    message = 'data: {"text": "\u00e4\U0001f600"}\n\n'
    body = f": heartbeat\n\n{message}event: error\r\ndata: one\r\ndata:two\r\n\r\ndata: cut off"
    events = await tab.page.evaluate(
        """async (body) => {
          const { serverSentEvents } = await import("./static/sse.js");
          const bytes = new TextEncoder().encode(body);
          const found = [];
          for (let size = 1; size <= bytes.length; size += 1) {
            const stream = new ReadableStream({
              start(controller) {
                for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
                controller.close();
              },
            });
            const events = [];
            for await (const { event, data } of serverSentEvents(stream)) events.push([event, data]);
            found.push(JSON.stringify(events));
          }
          return [...new Set(found)];
        }""",
        body,
    )
    assert [json.loads(one) for one in events] == [
        [["message", '{"text": "\u00e4\U0001f600"}'], ["error", "one\ntwo"]],
    ]


async def test_rates_of_slots(tab: Tab) -> None:
    """A rate is tokens over time; a replacement counts from zero, and nothing is made up for a time not looked at."""
    rates = await tab.page.evaluate(
        """async () => {
          const { Rates } = await import("./static/rates.js");
          const rates = new Rates();
          const looked = [[0, 100], [1000, 150], [2000, 200], [3000, 10], [20000, 5000], [21000, 5100]];
          return looked.map(([at, total]) => {
            rates.add(at, [{ slot: 0, engine: { num_tokens: total } }]);
            return [rates.samples.at(-1).gap, Math.round(rates.now(0))];
          });
        }"""
    )
    assert rates == [[True, 0], [False, 50], [False, 50], [False, 37], [True, 0], [False, 100]]


async def test_the_policy_is_strict(tab: Tab) -> None:
    """The page comes with a policy that allows its own origin alone."""
    response = await tab.page.context.request.get(tab.url)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
