"""The live environment in a real browser: pages, oracles, faults. Skipped where there is no Chromium."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from PIL import Image

from perl_vlm.errors import PerlVlmError
from perl_vlm.rollout.episodes import play
from perl_vlm.testing import check_task
from perl_vlm.types import SPLITS, Example
from perl_vlm_ui_automation import UiAutomation, UiAutomationConfig
from perl_vlm_ui_automation.actions import Action, format_action
from perl_vlm_ui_automation.elements import Element, center
from perl_vlm_ui_automation.miniwob.browser import Chromium
from perl_vlm_ui_automation.miniwob.demonstrate import Demonstrator
from perl_vlm_ui_automation.miniwob.launch import VARIABLE
from perl_vlm_ui_automation.miniwob.live import AS_NEW, MiniWob
from perl_vlm_ui_automation.miniwob.oracles import oracles
from perl_vlm_ui_automation.miniwob.pages import environments, html_folder
from perl_vlm_ui_automation.miniwob.places import FRAME, Outcome, Place, Screen
from perl_vlm_ui_automation.miniwob.pool import Pool
from perl_vlm_ui_automation.miniwob.records import place_of
from perl_vlm_ui_automation.miniwob.splits import Splits, layout, words

SEEDS = 20


def open_browser() -> Chromium:
    return Chromium(None, html_folder(), lambda env: env not in AS_NEW)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pytest.importorskip("playwright")
    pool = Pool(open_browser, 2)
    try:
        pool.visit(Place("click-test", 1))
    except PerlVlmError as error:
        pool.close()
        # Only what is not there is a reason to skip; a browser that is there and fails is a fault.
        if "no Chromium could be started" not in str(error) and "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    yield pool
    pool.close()


def task(env: str, pool: Pool, **knobs: object) -> UiAutomation:
    """A task whose browsers are the tests'."""
    found = UiAutomation(UiAutomationConfig(source="miniwob", env=env, **knobs))  # type: ignore[arg-type]
    found._miniwob = MiniWob(found.config, pool)
    return found


def screen_at(pool: Pool, place: Place) -> Screen:
    screen = pool.visit(place).screen
    assert screen is not None
    return screen


def middles(screen: Screen) -> dict[str, tuple[int, int]]:
    return {element.text: center(element.box or (0, 0, 0, 0)) for element in screen.elements}


def press(key: str) -> str:
    return format_action(Action("key", key=key))


def click(number: int) -> str:
    return format_action(Action("click", element=number))


def write(number: int, text: str) -> str:
    return format_action(Action("type", element=number, text=text))


# What is seen


def test_a_screen_has_the_instruction_the_elements_and_a_picture(pool: Pool) -> None:
    screen = screen_at(pool, Place("click-test-2", 3))
    assert screen.utterance == "Click button ONE."
    assert [(element.kind, element.text) for element in screen.elements] == [("button", "ONE"), ("button", "TWO")]
    assert all(50 <= (element.box or (0, 0))[1] < FRAME[1] for element in screen.elements)
    picture = Image.open(io.BytesIO(screen.png)).convert("RGB")
    assert picture.size == FRAME
    assert picture.getpixel((159, 2)) == (255, 255, 0)  # the yellow ground of the instruction


def test_fields_show_what_they_hold_and_typing_replaces_it(pool: Pool) -> None:
    place = Place("enter-password", 3).after(write(2, "wrong")).after(write(2, "ab")).after(write(4, "c"))
    held = [(element.kind, element.text) for element in screen_at(pool, place).elements if element.kind != "text"]
    assert held == [("password", "**"), ("password", "*"), ("button", "Submit")]


def test_boxes_and_lists_show_what_is_chosen(pool: Pool) -> None:
    boxes = screen_at(pool, Place("click-checkboxes", 3).after(click(1)))
    assert [element.kind for element in boxes.elements[:2]] == ["checkbox on", "checkbox"]
    before = screen_at(pool, Place("choose-list", 3))
    wanted = before.utterance.removeprefix("Select ").removesuffix(" from the list and click Submit.")
    after = screen_at(pool, Place("choose-list", 3).after(write(1, wanted)))
    assert after.elements[0].text == wanted


@pytest.mark.parametrize(
    "action",
    [
        Action("key", key="ctrl+a"),
        Action("scroll", direction="down", element=1),
        Action("drag", x=20, y=70, to_x=90, to_y=90),
        Action("long_press", x=20, y=120),
        Action("click", x=100, y=190, count=2, button="right"),
        Action("wait", seconds=2),
        Action("type", text="abc"),
    ],
    ids=lambda action: action.action,
)
def test_every_action_can_be_carried_out(pool: Pool, action: Action) -> None:
    assert not pool.visit(Place("copy-paste", 3).after(format_action(action))).over


@pytest.mark.parametrize(
    "action",
    [
        Action("click", element=9),
        Action("click", x=160, y=5),
        Action("drag", x=5, y=5, to_x=5, to_y=210),
        Action("key", key="F5"),
        Action("open_app", app="x"),
        Action("navigate", to="back"),
    ],
    ids=lambda action: action.action,
)
def test_what_cannot_be_carried_out_ends_the_episode_and_says_why(pool: Pool, action: Action) -> None:
    outcome = pool.visit(Place("click-test-2", 3).after(format_action(action)))
    assert (outcome.over, outcome.reward) == (True, -1.0)
    assert outcome.problem


def scrolled(place: Place, direction: str, times: int) -> Place:
    for _ in range(times):
        place = place.after(format_action(Action("scroll", direction=direction, element=1)))
    return place


@pytest.mark.parametrize(("to", "direction"), [("bottom", "down"), ("top", "up")])
def test_scrolling_moves_what_is_under_the_mouse_that_way(pool: Pool, to: str, direction: str) -> None:
    start = next(
        place
        for place in (Place("scroll-text-2", seed) for seed in range(20))
        if f"to the {to} of" in screen_at(pool, place).utterance and pool.visit(place.after(click(2))).reward == -1.0
    )
    other = "down" if direction == "up" else "up"
    ends = {
        (direction, 8): 1.0,
        (other, 8): -1.0,
    }
    for (way, times), reward in ends.items():
        assert pool.visit(scrolled(start, way, times).after(click(2))).reward == reward, (way, times)
    once, twice = (screen_at(pool, scrolled(start, direction, times)).png for times in (1, 2))
    assert once != twice != screen_at(pool, start).png


def test_dragging_takes_a_thing_along(pool: Pool) -> None:
    start = Place("drag-box", 5)
    at = middles(screen_at(pool, start))
    (x, y), (to_x, to_y) = at["s"], at["L"]
    submit = format_action(Action("click", x=at["Submit"][0], y=at["Submit"][1]))
    drags = {
        Action("drag", x=x, y=y, to_x=to_x, to_y=to_y): 1.0,
        Action("drag", x=x, y=y, to_x=to_x - 40, to_y=to_y): -1.0,
        Action("drag", x=140, y=60, to_x=to_x, to_y=to_y): -1.0,  # nothing lies where it begins
    }
    for action, reward in drags.items():
        assert pool.visit(start.after(format_action(action)).after(submit)).reward == reward, action
    assert middles(screen_at(pool, start.after(format_action(next(iter(drags))))))["s"] == (to_x, to_y)


def test_two_clicks_in_a_row_are_a_double_click(pool: Pool) -> None:
    start = Place("copy-paste", 3)
    area = next(element for element in screen_at(pool, start).elements if element.kind == "textarea")
    first = area.text.split()[0]
    left, top, _, _ = area.box or (0, 0, 0, 0)
    for count, wanted in ((2, f"X{area.text.removeprefix(first)}"), (1, f"{first[0]}X{first[1:]}")):
        there = start.after(format_action(Action("click", x=left + 9, y=top + 8, count=count)))
        said = [element.text for element in screen_at(pool, there.after('{"action":"type","text":"X"}')).elements]
        assert (wanted in said) == (count == 2), said


def test_only_waiting_and_acting_let_time_pass(pool: Pool) -> None:
    # ONE, wait, TWO: the page measures the seconds between the two clicks.
    start = Place("button-delay", 3)
    seconds = int(screen_at(pool, start).utterance.split("wait ")[1].split()[0])
    assert seconds > 1
    first, last = (click(number) for number in (1, 2))
    waited = {waiting: start.after(first).after(f'{{"action":"wait","seconds":{waiting}}}').after(last)
              for waiting in (seconds - 0.5, 30)}  # fmt: skip
    assert pool.visit(waited[seconds - 0.5]).reward == 1.0
    assert pool.visit(waited[30]).reward == -1.0
    pool.visit(start.after(first))
    time.sleep(seconds)  # of ours, which the page does not see
    assert pool.visit(start.after(first).after(last)).reward <= 0


@pytest.mark.parametrize("count", [2, 3])
def test_clicks_after_the_one_that_ends_an_episode_change_nothing(pool: Pool, count: int) -> None:
    for number, reward in ((1, 1.0), (2, -1.0)):
        outcome = pool.visit(Place("click-test-2", 3).after(f'{{"action":"click","element":{number},"count":{count}}}'))
        assert (outcome.over, outcome.reward) == (True, reward)


def test_what_is_copied_stays_in_its_page(pool: Pool) -> None:
    one = Pool(open_browser, 1)  # both pages in one browser

    def element(place: Place, kind: str) -> Element:
        return next(element for element in screen_at(one, place).elements if element.kind == kind)

    def paste(place: Place) -> Place:
        return place.after(click(element(place, "input").number)).after(press("ctrl+v"))

    try:
        starts = [Place("copy-paste", seed) for seed in (3, 4)]
        texts = [element(start, "textarea").text for start in starts]
        assert texts[0] != texts[1]
        chosen = [start.after(click(element(start, "textarea").number)).after(press("ctrl+a")) for start in starts]
        copied = [place.after(press("ctrl+c")) for place in chosen]
        one.visit_all(copied)
        assert [element(paste(place), "input").text for place in copied] == texts
        cut = chosen[0].after(press("ctrl+x"))
        assert [element(paste(cut), kind).text for kind in ("textarea", "input")] == ["", texts[0]]
        # An episode begins with nothing copied, on a page that was used before too.
        bare = [paste(Place("copy-paste", seed)) for seed in range(5, 10)]
        assert [element(place, "input").text for place in bare] == [""] * 5
    finally:
        one.close()


# What a page can reach


@pytest.fixture
def own_page(pool: Pool) -> Iterator[Any]:
    """A page of the environment, for what an action cannot do."""
    browser = open_browser()
    try:
        browser.visit(Place("terminal", 1))
        yield browser._tabs._pages[0]._page  # type: ignore[attr-defined]
    finally:
        browser.close()


READ = """async url => {
  const tries = {
    fetch: fetch(url).then(answer => answer.text()),
    request: new Promise((give, refuse) => {
      const request = new XMLHttpRequest();
      request.onloadend = () => request.responseText ? give(request.responseText) : refuse("nothing");
      request.open("GET", url);
      request.send();
    }),
    worker: new Promise((give, refuse) => {
      const program = `fetch("${url}").then(a => a.text()).then(postMessage, () => postMessage(""))`;
      const worker = new Worker(URL.createObjectURL(new Blob([program])));
      worker.onmessage = event => event.data ? give(event.data) : refuse("nothing");
      worker.onerror = () => refuse("nothing");
    }),
    script: new Promise((give, refuse) => {
      const script = Object.assign(document.createElement("script"), { src: url, onload: give, onerror: refuse });
      document.head.append(script);
    }),
    style: new Promise((give, refuse) => {
      const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href: url });
      document.head.append(Object.assign(link, { onload: give, onerror: refuse }));
    }),
    picture: new Promise((give, refuse) => Object.assign(new Image(), { src: url, onload: give, onerror: refuse })),
  };
  const late = new Promise((give, refuse) => setTimeout(refuse, 4000, "late"));
  const read = [];
  for (const [name, found] of Object.entries(tries)) {
    await Promise.race([found, late]).then(() => read.push(name), () => {});
  }
  const frame = Object.assign(document.createElement("iframe"), { src: url });
  document.body.append(frame);
  return read;
}"""


@pytest.mark.slow
def test_pages_reach_no_file_but_their_own(own_page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "secret.png")
    (tmp_path / "secret.css").write_text("body { color: red }")
    folder = html_folder()
    outside = [
        "file:///etc/passwd",
        *((tmp_path / name).as_uri() for name in ("secret.png", "secret.css")),
        f"{folder.as_uri()}/../../__init__.py",
        f"{folder.as_uri()}/..%2f..%2f__init__.py",
    ]
    # The way of the test works: with the page's clock running, its own files are read.
    own_page.clock.resume()
    assert "style" in own_page.evaluate(READ, (folder.parent / "core" / "core.css").as_uri())
    for url in outside:
        assert own_page.evaluate(READ, url) == [], url
        assert url not in {frame.url for frame in own_page.frames}
        before = own_page.url
        own_page.evaluate("url => { location.href = url }", url)
        own_page.wait_for_timeout(300)
        assert own_page.url == before
        assert own_page.evaluate("perlVlm.over()") is False


CALL = """async ([host, port]) => {
  const address = `${host}:${port}`;
  const quiet = call => { try { const done = call(); if (done && done.catch) done.catch(() => {}); } catch {} };
  quiet(() => fetch(`http://${address}/fetch`, { mode: "no-cors" }));
  quiet(() => new WebSocket(`ws://${address}/socket`));
  quiet(() => new EventSource(`http://${address}/events`));
  quiet(() => navigator.sendBeacon(`http://${address}/beacon`));
  quiet(() => new Image().src = `http://${address}/picture`);
  for (const rel of ["preconnect", "prefetch", "stylesheet"]) {
    document.head.append(Object.assign(document.createElement("link"), { rel, href: `http://${address}/${rel}` }));
  }
  document.body.append(Object.assign(document.createElement("iframe"), { src: `http://${address}/frame` }));
  quiet(async () => {
    window.kept = new RTCPeerConnection({ iceServers: [{ urls: `stun:${address}` }] });
    window.kept.createDataChannel("data");
    await window.kept.setLocalDescription(await window.kept.createOffer());
  });
}"""


class Listener:
    """Who calls a port of this machine, by TCP and by UDP."""

    def __init__(self) -> None:
        self.calls = {"tcp": 0, "udp": 0}
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        for name, hear in (("tcp", self.accept), ("udp", lambda: self.udp.recv(99))):
            threading.Thread(target=self.listen, args=(name, hear), daemon=True).start()

    def accept(self) -> None:
        self.tcp.accept()[0].close()

    def listen(self, name: str, hear: Callable[[], object]) -> None:
        while True:
            try:
                hear()
            except OSError:
                return
            self.calls[name] += 1

    def close(self) -> None:
        self.tcp.close()
        self.udp.close()


@pytest.mark.slow
def test_pages_reach_no_network(own_page: Any) -> None:
    listener = Listener()
    try:
        own_page.clock.resume()
        own_page.evaluate(CALL, ["127.0.0.1", listener.port])
        own_page.wait_for_timeout(1500)
        before = own_page.url
        own_page.evaluate("port => { location.href = `http://127.0.0.1:${port}/` }", listener.port)
        own_page.wait_for_timeout(500)
        assert own_page.url == before
        assert listener.calls == {"tcp": 0, "udp": 0}
        # The same calls arrive from a browser that nothing holds back.
        launcher = own_page.context.browser.browser_type
        free = launcher.launch(executable_path=os.environ.get(VARIABLE) or which("chromium"), headless=True)
        try:
            page = free.new_page()
            page.goto((html_folder() / "terminal.html").as_uri())
            page.evaluate(CALL, ["127.0.0.1", listener.port])
            page.wait_for_timeout(1500)
        finally:
            free.close()
        assert listener.calls["tcp"] >= 5
        assert listener.calls["udp"] >= 1
    finally:
        listener.close()


def test_what_is_typed_is_no_program(pool: Pool) -> None:
    # The terminal repeats a command as markup. This one would end the episode as won.
    start = Place("terminal", 1)
    typed = start.after(format_action(Action("click", x=80, y=100)))
    for command in ("<img src=x onerror=core.endEpisode(1)>", "<svg onload=core.endEpisode(1)>"):
        typed = typed.after(format_action(Action("type", text=command))).after(press("enter"))
    outcome = pool.visit(typed.after('{"action":"wait","seconds":1}'))
    assert not outcome.over
    said = " ".join(element.text for element in screen_at(pool, typed).elements)
    assert "Command not found" in said


# Pages whose scripts fail


BROKEN = """<html><head><script src="../core/core.js"></script><script>
var genProblem = function() {
  document.getElementById("query").innerHTML = "Press the button.";
  document.getElementById("button").onclick = function() { %s };
  %s
};
window.onload = function() { core.startEpisode(); };
</script></head><body><div id="wrap"><div id="query"></div><div id="area"><button id="button">Press</button></div></div>
</body></html>"""
SCRIPTS = {
    "sound": ("core.endEpisode(1)", ""),
    "start": ("core.endEpisode(1)", "nothing.at.all()"),
    "timer": ("setTimeout(function() { nothing.at.all() }, 100)", ""),
    "look": ("core.getUtterance = function() { return nothing.at.all() }", ""),
    "leaves": ("location.href = 'sound.html'; setTimeout(function() { core.endEpisode(1) }, 9999)", ""),
}


def test_a_script_error_of_the_pages_own_ends_the_episode_and_not_the_browser(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "html" / "miniwob"
    folder.mkdir(parents=True)
    (tmp_path / "html" / "core").mkdir()
    (tmp_path / "html" / "core" / "core.js").write_bytes((html_folder().parent / "core" / "core.js").read_bytes())
    for name, scripts in SCRIPTS.items():
        (folder / f"{name}.html").write_text(BROKEN % scripts)
    one = Pool(lambda: Chromium(None, folder, lambda env: False), 1)
    try:
        assert one.visit(Place("sound", 1).after(click(1))).reward == 1.0
        (process,) = one.processes
        for name in ("start", "timer", "look", "leaves"):
            outcome = one.visit(Place(name, 1).after(click(1)))
            assert (outcome.over, outcome.reward, outcome.broken) == (True, -1.0, True), (name, outcome)
            assert outcome.problem
        assert one.visit(Place("sound", 2).after(click(1))).reward == 1.0
        assert one.counts == {"visits": 6, "lost_browsers": 0, "repeats": 0, "page_errors": 4}
        assert one.processes == [process]
    finally:
        one.close()


# The same place is the same


def some_actions(screen: Screen) -> Iterator[str]:
    for element in screen.elements:
        if element.clickable:
            yield write(element.number, "abc") if element.kind in ("input", "password") else click(element.number)


@pytest.mark.parametrize(
    "env",
    ["click-tab", *(pytest.param(env, marks=pytest.mark.slow) for env in sorted(AS_NEW) if env != "click-tab")],
)
def test_an_episode_looks_the_same_after_others_and_when_it_is_played_again(
    pool: Pool, env: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever its page comes from: just loaded, used by other episodes, or played up to there a second time."""
    monkeypatch.setattr("perl_vlm_ui_automation.miniwob.browser.TABS", 1)
    loaded, reused = (
        Pool(lambda anew=anew: Chromium(None, html_folder(), lambda env: anew), 1) for anew in (True, False)
    )
    try:
        start = Place(env, 3)
        first = loaded.visit(start)
        assert first.screen is not None
        for seed in (9, 12):
            dirty = Place(env, seed)
            for action in list(some_actions(first.screen))[:3]:
                dirty = dirty.after(action)
                if reused.visit(dirty).over:
                    break
        assert reused.visit(start) == first
        there = start.after(next(some_actions(first.screen)))
        seen = loaded.visit(there)
        loaded._seen.clear()
        loaded.visit(Place(env, 30))
        assert [loaded.visit(there), reused.visit(there)] == [seen, seen]
    finally:
        loaded.close()
        reused.close()


@pytest.mark.slow
@pytest.mark.parametrize("env", sorted(oracles()))
def test_the_oracle_wins(pool: Pool, env: str) -> None:
    assert env in environments()
    by = Demonstrator(pool, oracles(), max_turns=20)
    episodes = [by.play(Place(env, 3 * seed + 1)) for seed in range(SEEDS)]
    won = [moments for moments in episodes if moments is not None]
    assert len(won) >= 0.95 * SEEDS
    if oracles()[env].turns == 1:
        assert {len(moments) for moments in won} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("env", ["button-delay", "odd-or-even", "copy-paste", "guess-number", "click-collapsible-2"])
def test_oracles_remember_nothing(pool: Pool, env: str) -> None:
    """Episodes played in turns, beside one another, are those that are played alone."""
    by = Demonstrator(pool, oracles(), max_turns=20)
    alone = {start: moments for start in (Place(env, 3 * seed + 1) for seed in range(3)) if (moments := by.play(start))}
    assert len(alone) >= 2
    there = {start: start for start in alone}
    for _ in range(max(map(len, alone.values()))):
        for start, place in there.items():
            screen = pool.visit(place).screen
            if screen is not None:
                there[start] = place.after(by.next_action(place, screen))
    assert {start: there[start].actions for start in alone} == {
        start: tuple(moment.action for moment in moments) for start, moments in alone.items()
    }


# Faults


def test_a_browser_killed_in_the_middle_of_an_episode_is_replaced(pool: Pool) -> None:
    one = Pool(open_browser, 1)
    try:
        start = Place("enter-text", 6)
        name = screen_at(one, start).utterance.split('"')[1]
        typed = start.after(write(1, name))
        before = one.visit(typed)
        (process,) = one.processes
        os.kill(process, signal.SIGKILL)
        assert one.visit(typed.after(click(2))).reward == 1.0
        assert one.counts["lost_browsers"] == 1
        assert one.processes != [process]
        one._seen.clear()
        assert one.visit(typed) == before
    finally:
        one.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_browser_that_hangs_is_replaced(pool: Pool) -> None:
    one = Pool(open_browser, 1, patience=15)
    try:
        one.visit(Place("click-test-2", 6))
        os.kill(one.processes[0], signal.SIGSTOP)
        assert one.visit(Place("click-test-2", 6).after(click(1))).reward == 1.0
        assert one.counts["lost_browsers"] == 1
    finally:
        one.close()


@pytest.mark.slow
def test_a_page_that_crashes_is_replaced(pool: Pool) -> None:
    one = Pool(open_browser, 1)
    try:
        one.visit(Place("click-test-2", 6))
        listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()
        children = {one.processes[0]}
        for _ in range(3):  # renderers are children of a zygote
            children |= {int(line.split()[0]) for line in listing[1:] if int(line.split()[1]) in children}
        renderers = [int(line.split()[0]) for line in listing[1:] if "--type=renderer" in line]
        mine = [process for process in renderers if process in children]
        assert mine
        for process in mine:
            os.kill(process, signal.SIGKILL)
        assert one.visit(Place("click-test-2", 6).after(click(1))).reward == 1.0
        assert one.counts["lost_browsers"] == 1
    finally:
        one.close()


@pytest.mark.slow
def test_many_browsers_killed_while_they_work_lose_no_episode(pool: Pool) -> None:
    two = Pool(open_browser, 2)
    places = [Place("click-test-2", seed).after(click(1 + seed % 2)) for seed in range(60)]
    done = threading.Event()

    def killer() -> None:
        for _ in range(2):
            if done.wait(0.7):
                return
            for process in two.processes:
                os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        outcomes = two.visit_all(places)
    finally:
        done.set()
        thread.join()
        two.close()
    assert [outcome.reward for outcome in outcomes] == [(-1.0 if seed % 2 else 1.0) for seed in range(60)]


def test_a_browser_that_is_not_there_is_named(pool: Pool) -> None:
    with pytest.raises(PerlVlmError, match=r"/no/chrome \(task.chromium\).*playwright install chromium"):
        Chromium("/no/chrome", html_folder(), lambda env: False)


@pytest.mark.slow
def test_a_process_that_forgets_to_close_ends_and_leaves_no_browser(pool: Pool) -> None:
    program = (
        "from perl_vlm_ui_automation import UiAutomation, UiAutomationConfig\n"
        "task = UiAutomation(UiAutomationConfig(source='miniwob', env='click-test', browsers=1))\n"
        "task.examples('train')[0]\n"
        "print(*task.miniwob.pool.processes)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(found.stdout), 0)


# The task


@pytest.mark.slow
def test_the_task_is_sound(pool: Pool) -> None:
    check_task(task("click-button,enter-text", pool, train_size=4, validation_size=4, test_size=4), samples=2)


@pytest.mark.slow
def test_what_keeps_the_splits_of_pages_apart(pool: Pool) -> None:
    splits = Splits(pool)
    kept = {env: splits.content(env) for env in ("click-color", "grid-coordinate", "click-test-2", "guess-number")}
    assert kept == {"click-color": words, "grid-coordinate": words, "click-test-2": layout, "guess-number": None}
    # Twenty-five prompts are all that the grid has.
    live = task("grid-coordinate", pool, train_size=16, validation_size=8, test_size=8, hint=False)
    said = {split: {record.messages[0].text for record in live.examples(split)} for split in SPLITS}
    assert sum(map(len, said.values())) == len(set().union(*said.values())) > 8


@dataclass
class Said:
    text: str


def test_oracles_win_their_episodes_through_the_environment(pool: Pool) -> None:
    live = task("click-link,click-option,login-user", pool, test_size=6, hint=False)
    environment = live.environment()
    assert environment is not None
    by = Demonstrator(pool, oracles(), max_turns=8)

    def answer(prompts: object, episodes: object, turn: int) -> list[Said]:
        assert isinstance(prompts, list)
        places = [place_of(prompt.metadata) for prompt in prompts]
        return [Said(by.next_action(place, screen_at(pool, place))) for place in places]

    turns = play(environment, list(live.examples("test")), answer)
    last = {turn.episode: turn for turn in turns}
    assert [turn.prompt.metadata["episode_turns"] for turn in last.values()] == [1, 2, 3] * 2
    for turn in turns:
        scores = live.evaluate(turn.prompt, turn.answer.text)
        assert (scores["success"], scores["raw_reward"], scores["parsed"]) == (1.0, 1.0, 1.0)
        assert live.verify(turn.prompt, turn.answer.text) == 1.0


def test_one_action_is_judged_by_what_can_still_be_won(pool: Pool) -> None:
    live = task("enter-text", pool)
    example = live.examples("train")[0]
    name = example.messages[0].text.split('"')[1]
    assert live.evaluate(example, write(1, name)) == {"success": 1.0, "raw_reward": 1.0, "parsed": 1.0, "turns": 2.0}
    assert live.evaluate(example, click(2))["success"] == 0.0
    assert live.evaluate(example, "hello") == {"success": 0.0, "raw_reward": -1.0, "parsed": 0.0, "turns": 1.0}


def test_prompts_fit_the_bundled_model(pool: Pool) -> None:
    from transformers import AutoTokenizer

    from perl_vlm.models.backbone import TINY

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    lengths = {
        (env, hint): max(
            len(tokenizer(example.messages[0].text, padding=False).input_ids)
            for example in task(env, pool, hint=hint).examples("train")[:4]
        )
        for env in ("click-test-2", "click-button", "click-option", "enter-text", "click-dialog-2")
        for hint in (True, False)
    }
    # It reads 512 tokens, of which a picture takes some 20.
    assert all(length < (300 if hint else 180) for (_, hint), length in lengths.items()), lengths


def test_environments_without_an_oracle_have_episodes_and_no_demonstrations(pool: Pool) -> None:
    live = task("circle-center", pool, train_size=2)
    example = live.examples("train")[0]
    assert isinstance(example, Example)
    assert example.reference is None
    assert live.evaluate(example, '{"action":"click","x":80,"y":120}')["success"] == 0.0
    with pytest.raises(PerlVlmError, match=r"no demonstrations for circle-center.*click-button"):
        live.demonstrations("train")
    mixed = task("circle-center,click-test", pool, train_size=4).demonstrations("train")
    assert {record.metadata["env"] for record in mixed} == {"click-test"}


def test_outcomes_are_plain_records() -> None:
    assert Outcome(reward=1.0).over
    assert not Outcome(Screen("", (), b"")).over
