"""The page in a real browser: a document is added and asked, and what it reads is seen."""

import json
import time

import httpx
import pytest
from browser import browsing, looking
from served import serving
from tiny import document

QUESTION = "What is alpha?"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title = 2</script> & "alpha". '


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("contexts")) as served:
        served.make("one", sentences())
        yield served


@pytest.fixture
def page(browser, served):
    with looking(browser, f"{served.base}/#one") as page:
        page.wait_for_selector("#document .passage-text")
        yield page


def sentences(seed=0):
    """A document of sentences, some of them of letters that take two halves in JavaScript."""
    words = document(500, seed).split()
    parts = [" ".join(words[i : i + 9]) for i in range(0, len(words), 9)]
    return "\n".join(f"{part} \U0001f642." for part in parts)


def until(page, holds):
    """Wait for an expression; the page's policy forbids a driver to evaluate it by itself."""
    end = time.monotonic() + 60
    while not page.evaluate(holds):
        assert time.monotonic() < end, holds
        page.wait_for_timeout(30)


def ask(page, question=QUESTION, tokens=8):
    page.fill("#question", question)
    page.fill("#longest", str(tokens))
    page.click("#send")
    page.wait_for_selector("#state:empty", state="attached")
    page.wait_for_selector("#reads:not([hidden])")


def told(served, context="one", **more):
    """What the server says of the same question."""
    body = {
        "model": "tiny", "context": context, "budget": 0.2, "max_tokens": 8,
        "messages": [{"role": "user", "content": QUESTION}],
        "squeezed": {"passages": True, "tokens": True},
    }  # fmt: skip
    answer = httpx.post(f"{served.base}/v1/chat/completions", json=body | more, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def heats(page):
    """Shade of every passage that has one, as the style says it and as it is painted."""
    found = page.eval_on_selector_all(
        ".passage-text.read",
        """all => all.map(e => [Number(e.dataset.index), Number(e.style.getPropertyValue('--heat')),
                                getComputedStyle(e).backgroundColor])""",
    )
    return {index: (heat, colour) for index, heat, colour in found}


def standing_out(report, shares):
    """How far shares stand out from what a neutral question's answer gives the same passages."""
    usual = [each["share"] - each["excess"] for each in report["passages"]]
    least = 0.02 / len(usual)
    return [(i, max(0, share - usual[i]) / max(least, usual[i]) ** 0.5) for i, share in shares]


def expected_heats(shares):
    most = max(share for _, share in shares)
    found = {index: (share / most) ** 0.8 for index, share in shares}
    return {index: heat for index, heat in found.items() if heat > 0.04}


def same_heats(page, shares):
    found, expected = heats(page), expected_heats(shares)
    return found.keys() == expected.keys() and all(
        found[i][0] == pytest.approx(expected[i], abs=2e-3) for i in found
    )


def test_document_is_added_read_and_shown_as_it_is(page, served):
    text = HOSTILE + sentences(1)
    page.click("#add")
    page.fill("#text", text)
    page.fill("#name", "pasted")
    page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => document.querySelectorAll('#jobs p')
          .forEach(e => window.seen.add(e.textContent)))
          .observe(document.querySelector('#jobs'), {subtree: true, childList: true}); }"""
    )
    page.click("#create")
    until(page, "document.querySelector('#context').value === 'pasted'")
    until(page, "document.querySelector('#document').textContent.includes('onerror')")
    lines = page.evaluate("[...window.seen]")
    assert any("the model reads it" in line for line in lines), lines
    assert page.locator("#jobs li").count() == 0
    told = httpx.get(f"{served.base}/v1/contexts/pasted/passages").json()
    assert told["text"] == text
    shown = page.eval_on_selector_all(".passage-text", "all => all.map(e => e.textContent)")
    assert shown == [text[each["start"] : each["end"]].strip() for each in told["data"]]
    assert page.text_content("#document") == text
    assert page.locator("#document img, #document script").count() == 0
    assert page.title() == "pasted – ask a document"
    size = httpx.get(f"{served.base}/v1/contexts/pasted").json()["tokens"]
    assert f"{size:,} tokens" in page.locator("#context option:checked").text_content()


def test_uploaded_file_is_added_by_its_name(page, tmp_path):
    (tmp_path / "My manual.md").write_text(sentences(2), encoding="utf-8")
    page.click("#add")
    page.set_input_files("#file", tmp_path / "My manual.md")
    page.click("#create")
    until(page, "document.querySelector('#context').value === 'My-manual'")


def test_answer_streams_in_words_and_shades_what_was_read(page, served):
    page.evaluate(
        """() => { window.seen = [];
        new MutationObserver(() => window.seen.push(document.querySelector('#answer').textContent))
          .observe(document.querySelector('#answer'), {subtree: true, childList: true}); }"""
    )
    ask(page, tokens=8)
    expected = told(served)
    assert page.text_content("#answer") == expected["choices"][0]["message"]["content"]
    seen = page.evaluate("window.seen")
    assert len(set(seen)) > 3 and seen == sorted(seen, key=len)
    told_shares = [(each["index"], each["share"]) for each in expected["squeezed"]["passages"]]
    assert same_heats(page, standing_out(expected["squeezed"], told_shares))
    page.get_by_text("all attention").click()
    assert same_heats(page, told_shares)
    colours = {colour for _, colour in heats(page).values()}
    assert len(colours) > 2
    spent = expected["squeezed"]["budget_spent"]
    assert f"{spent:.0%}".replace("%", " %") in page.text_content("#figures")


def test_word_shows_what_was_read_for_it(page, served):
    ask(page)
    whole = heats(page)
    page.mouse.move(0, 0)
    expected = told(served)["squeezed"]
    text, words = page.text_content("#answer"), page.locator("#answer [role=option]")
    tokens = [token for token in expected["tokens"] if token["start"] == 0 < token["end"]]
    first = words.nth(0)
    length = len(first.text_content())
    own = [t for t in expected["tokens"] if t["start"] < length and t["end"] > 0]
    assert tokens and own and text.startswith(first.text_content())
    mean = {}
    for token in own:
        for passage, share in token["passages"]:
            mean[passage] = mean.get(passage, 0) + share / len(own)
    seen = standing_out(expected, mean.items())
    first.hover()
    assert page.text_content("#reads-title") == f"Read for “{first.text_content()}”"
    assert same_heats(page, seen)
    page.hover("h1")
    assert heats(page) == whole
    first.focus()
    assert same_heats(page, seen)
    page.keyboard.press("Enter")
    assert first.get_attribute("aria-selected") == "true"
    top = max(seen, key=lambda each: each[1])[0]
    assert page.get_attribute(".passage-text.chosen", "data-index") == str(top)
    page.keyboard.press("Escape")
    assert first.get_attribute("aria-selected") == "false"


def test_marks_and_passages_lead_to_their_place(page):
    page.set_viewport_size({"width": 1280, "height": 420})
    ask(page)
    marks = page.locator("#strip [role=option]")
    assert marks.count() > 1
    marks.nth(0).focus()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    last = marks.nth(marks.count() - 1)
    assert last.get_attribute("aria-selected") == "true"
    chosen = page.locator(".passage-text.chosen")
    assert chosen.get_attribute("data-index") == last.get_attribute("data-index")
    until(
        page,
        """() => { const [c, d] = ['.passage-text.chosen', '#document']
            .map(s => document.querySelector(s).getBoundingClientRect());
          return c.bottom > d.top && c.top < d.bottom; }""",
    )
    page.locator(".passage-text").nth(0).click()
    assert chosen.get_attribute("data-index") == "0"
    assert page.text_content("#passage").startswith("Passage 1 of")


def test_slider_changes_the_budget(page, served):
    page.focus("#budget")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert page.text_content("#budget-said") == "50 %"
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page)
    assert sent.value.post_data_json["budget"] == 0.5
    expected = told(served, budget=0.5)
    assert page.text_content("#answer") == expected["choices"][0]["message"]["content"]
    assert "50 % asked for" in page.text_content("#figures")


def test_dense_answer_stands_beside_in_words_bytes_and_time(page, served):
    page.check("#compare")
    ask(page)
    page.wait_for_selector(".comparison")
    ours, theirs = told(served), told(served, budget=1)
    text = [each["choices"][0]["message"]["content"] for each in (ours, theirs)]
    assert page.text_content("#answer") == text[0]
    assert page.text_content("#dense-answer") == text[1]
    rows = page.eval_on_selector_all(
        ".comparison tbody tr", "all => all.map(row => [...row.cells].map(c => c.textContent))"
    )
    read = [each["squeezed"]["bytes_per_token"]["total"] for each in (ours, theirs)]
    assert rows[0][0] == "read per token" and rows[0][3] == f"{read[1] / read[0]:.1f} ×"
    assert [row[0] for row in rows[1:3]] == ["first token", "each further token"]
    marked = page.locator("#dense-answer .differs").count()
    words = len(text[1].split())
    said = rows[3][1]
    assert said == f"all {words} alike" if not marked else said.startswith(f"{words - marked} of")


def test_difference_in_words_is_the_longest_common_part(page):
    found = page.evaluate(
        """async () => (await import('/page/words.js'))
             .shared('a b c d'.split(' '), 'b x d e'.split(' '))"""
    )
    assert found == [[False, True, False, True], [True, False, True, False]]


def test_error_is_shown_in_words_and_leaves_the_page_usable(page):
    page.fill("#question", QUESTION)
    page.fill("#longest", "999999")
    page.click("#send")
    page.wait_for_selector("#failure:not(:empty)")
    assert "expected at most 4096, got 999999" in page.text_content("#failure")
    assert page.get_attribute("#failure", "role") == "alert"
    ask(page)
    assert page.text_content("#failure") == ""


def test_server_that_does_not_answer_is_said(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#question", QUESTION)
    page.click("#send")
    page.wait_for_selector("#failure:not(:empty)")
    assert "does not answer" in page.text_content("#failure")


def answering(body):
    return lambda route: route.fulfill(content_type="text/event-stream", body=body)


def test_stream_that_breaks_off_is_said(page):
    chunk = {"choices": [{"index": 0, "delta": {"content": "half an"}, "finish_reason": None}]}
    fault = {"error": {"message": "the server has no memory left", "type": "overloaded_error"}}
    for more, words in (([], "broke off"), ([fault], "no memory left")):
        body = "".join(f"data: {json.dumps(each)}\n\n" for each in [chunk, *more])
        page.unroute_all()
        page.route("**/v1/chat/completions", answering(body))
        page.fill("#question", QUESTION)
        page.click("#send")
        page.wait_for_selector(f"#failure:has-text('{words}')")
        assert page.text_content("#answer") == "half an"


def test_document_that_cannot_be_added_is_said(page):
    page.click("#add")
    page.click("#create")
    assert "Choose a file" in page.text_content("#new-failure")
    page.fill("#text", "alpha")
    page.fill("#name", "../out")
    page.click("#create")
    page.wait_for_selector("#new-failure:has-text('name')")
    page.fill("#name", "one")
    page.click("#create")
    page.wait_for_selector("#new-failure:has-text('one')")
    page.keyboard.press("Escape")
    assert not page.locator("#new").is_visible()


def test_page_allows_no_script_or_style_of_others(served):
    answer = httpx.get(served.base)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "<style" not in answer.text and " style=" not in answer.text
    assert answer.text.count("<script") == answer.text.count('<script type="module" src=')
    assert httpx.get(f"{served.base}/page/main.js").headers["cache-control"] == "no-cache"


def test_key_is_asked_for_and_kept_for_the_tab_alone(browser, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-more-than-sixteen\n")
    with (
        serving(tmp_path / "contexts", api_key_file=keys) as served,
        looking(browser, served.base) as page,
    ):
        for key in ("another-key-that-is-none", "a-key-of-more-than-sixteen"):
            page.wait_for_selector("#key-form:not([hidden])")
            page.fill("#key", key)
            page.keyboard.press("Enter")
            if key.startswith("another"):
                page.wait_for_selector("#failure:has-text('does not know this key')")
        until(page, "document.querySelector('#key-form').hidden")
        assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
        assert page.context.cookies() == []
        page.reload()
        page.wait_for_selector("#model:has-text('tiny')")
        assert page.locator("#key-form").is_hidden() and page.text_content("#failure") == ""


def long_document(passages=4000, each=100):
    """The routes' answers for a document of about 100,000 tokens."""
    texts = [
        f"{i} {'alpha beta gamma delta ' * 4}".ljust(each - 1, ".") + "\n" for i in range(passages)
    ]
    data = [
        {"index": i, "start": i * each, "end": (i + 1) * each, "tokens": [i * 25, i * 25 + 25]}
        for i in range(passages)
    ]
    return {"object": "list", "context": "one", "text": "".join(texts), "data": data}


def test_long_document_is_laid_out_where_it_is_seen(page):
    page.route("**/passages", lambda route: route.fulfill(json=long_document()))
    page.reload()
    until(page, "document.querySelectorAll('.passage-text').length === 4000")
    seen = page.evaluate(
        """() => [...document.querySelectorAll('.block')]
             .map(e => e.firstElementChild.checkVisibility({contentVisibilityAuto: true}))"""
    )
    assert seen[0] and len(seen) > 100 and sum(seen) < 20
    page.evaluate("document.querySelector('#strip canvas').scrollIntoView()")
    box = page.locator("#strip canvas").bounding_box()
    page.mouse.click(box["x"] + 15, box["y"] + box["height"] - 2)
    until(
        page,
        """() => { const last = [...document.querySelectorAll('.passage-text')].at(-5)
            .getBoundingClientRect(), sheet = document.querySelector('#document')
            .getBoundingClientRect();
          return last.top < sheet.bottom + 400 && last.bottom > sheet.top - 400; }""",
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_access(browser, served, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-core"
    ).Axe()
    with looking(browser, f"{served.base}/#one", color_scheme=scheme) as page:
        page.wait_for_selector("#document .passage-text")
        assert serious(axe.run(page)) == []
        page.check("#compare")
        ask(page)
        page.wait_for_selector(".comparison")
        assert serious(axe.run(page)) == []
        page.click("#answer [role=option]")
        assert serious(axe.run(page)) == []
        page.click("#add")
        page.click("#create")
        assert serious(axe.run(page)) == []


def serious(results):
    return [
        (each["id"], each["nodes"][0]["html"])
        for each in results.response["violations"]
        if each["impact"] in ("serious", "critical")
    ]


def test_all_of_it_can_be_reached_by_the_keyboard(page):
    page.focus("#question")
    page.keyboard.type(QUESTION)
    page.fill("#longest", "8")
    page.focus("#question")
    page.keyboard.press("Enter")
    page.wait_for_selector("#reads:not([hidden])")
    page.wait_for_selector("#state:empty", state="attached")
    page.focus(".skip")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => { const e = document.activeElement;
                     return e.id || e.closest('[id]')?.id || e.tagName; }"""
            )
        )
    wanted = ["add", "context", "question", "budget", "compare", "longest", "send", "answer",
              "reads-list", "document", "strip"]  # fmt: skip
    places = [reached.index(name) for name in wanted]
    assert places == sorted(places)
    page.focus("#document")
    page.keyboard.press("n")
    assert page.locator(".passage-text.chosen").count() == 1


def test_narrow_screens_need_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 340, "height": 700})
    page.check("#compare")
    ask(page)
    page.wait_for_selector(".comparison")
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
