import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.errors import InvalidRequestError
from raylm.messages import Message
from raylm.template import CHATML_META, INTERNLM2_META, MetaTemplate, parse_messages

INTERNLM2 = MetaTemplate.parse(INTERNLM2_META)
CHATML = MetaTemplate.parse(CHATML_META)
OPEN_ENDED = MetaTemplate.parse(
    [
        {"role": "user", "begin": "<|User|>:", "end": "<eoh>\n"},
        {"role": "assistant", "begin": "<|Bot|>:", "end": "<eoa>\n", "generate": True},
    ]
)

# Without "<" no content can pose as a marker, so a rendered prompt can be read back.
contents = st.text(st.characters(codec="utf-8", exclude_characters="<"))
names = st.none() | st.sampled_from(["interpreter", "plugin"]) | st.text("abc", min_size=1)


def messages(template: MetaTemplate, names: st.SearchStrategy[str | None] = names) -> st.SearchStrategy[Message]:
    """Return messages in the roles of `template`."""
    return st.builds(Message, role=st.sampled_from(list(template.roles)), content=contents, name=names)


def render(meta_template: object, *conversation: dict[str, object]) -> str:
    """Render a conversation of dicts with a meta template as users write both."""
    return MetaTemplate.parse(meta_template).render(parse_messages(list(conversation)))


def test_render_internlm2() -> None:
    """A conversation with InternLM2's template is ChatML and ends where the assistant begins."""
    prompt = render(
        INTERNLM2_META,
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "2+2?"},
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_render_name_in_table() -> None:
    """A name in the table of its role is spelled as the table says."""
    prompt = render(INTERNLM2_META, {"role": "environment", "content": "4", "name": "interpreter"})
    assert prompt == "<|im_start|>environment name=<|interpreter|>\n4<|im_end|>\n<|im_start|>assistant\n"


def test_render_name_not_in_table() -> None:
    """A name that its role's table does not have stands as it is, braces included."""
    prompt = render(INTERNLM2_META, {"role": "user", "content": "hello", "name": "{name} {0}"})
    assert prompt.startswith("<|im_start|>user name={name} {0}\nhello<|im_end|>\n")


def test_render_name_without_place() -> None:
    """A name is refused, not dropped, where the role's begin has no place for one."""
    with pytest.raises(InvalidRequestError, match=r"messages\[1\].*no place for the name 'bob' of a user message"):
        render(CHATML_META, {"role": "system", "content": ""}, {"role": "user", "content": "hello", "name": "bob"})


def test_render_last_message_of_assistant() -> None:
    """A conversation that ends with the assistant is closed, and no other begin follows."""
    prompt = render(CHATML_META, {"role": "assistant", "content": "Hi!"})
    assert prompt == "<|im_start|>assistant\nHi!<|im_end|>\n"


def test_render_generate_leaves_last_message_open() -> None:
    """The last message of a role marked generate has no end, so that the model goes on with it."""
    conversation = (Message("user", "Count."), Message("assistant", "1, 2,"))
    assert OPEN_ENDED.render(conversation) == "<|User|>:Count.<eoh>\n<|Bot|>:1, 2,"


def test_render_generate_names_role_of_model() -> None:
    """The prompt ends with the begin of the role marked generate, whatever that role is called."""
    meta = [{"role": "HUMAN", "begin": "H:", "end": "\n"}, {"role": "BOT", "begin": "B:", "generate": True}]
    assert render(meta, {"role": "HUMAN", "content": "hello"}) == "H:hello\nB:"


def test_render_fallback_role() -> None:
    """Messages of a role with a fallback are rendered as messages of the fallback."""
    meta = [*CHATML_META, {"role": "tool", "fallback_role": "user"}]
    assert render(meta, {"role": "tool", "content": "4"}) == render(meta, {"role": "user", "content": "4"})


def test_render_unknown_role() -> None:
    """The error about an unknown role names the message, the role and the roles there are."""
    expected = re.escape("messages[1]: unknown role 'tool'; roles are system, user, assistant")
    with pytest.raises(InvalidRequestError, match=expected):
        render(CHATML_META, {"role": "user", "content": "2+2?"}, {"role": "tool", "content": "4"})


@given(st.lists(messages(INTERNLM2)))
def test_render_prompt_can_be_read_back(conversation: list[Message]) -> None:
    """Every message is in the prompt once, in order and whole, so different conversations differ as prompts."""
    prompt = INTERNLM2.render(conversation)
    found = re.findall(r"<\|im_start\|>(\w+)(?: name=(.*))?\n([^<]*)<\|im_end\|>\n", prompt)
    assert [Message(role, content, name.strip("<|>") or None) for role, name, content in found] == conversation


@pytest.mark.parametrize("template", [INTERNLM2, CHATML, OPEN_ENDED])
@given(data=st.data())
def test_render_prompt_is_prefix_of_next_prompt(template: MetaTemplate, data: st.DataObject) -> None:
    """A prompt, and that prompt with the reply, begin the prompt of the conversation's next turn."""
    conversation = data.draw(st.lists(messages(template, st.none())))
    reply = Message("assistant", data.draw(contents))
    following = data.draw(st.lists(messages(template, st.none())))
    prompt = template.render(conversation)
    replied = template.render([*conversation, reply])
    next_prompt = template.render([*conversation, reply, *following])
    assert replied.startswith(prompt)
    assert next_prompt.startswith(replied)
    if not conversation or conversation[-1].role != "assistant":
        assert next_prompt.startswith(prompt + reply.content)


@pytest.mark.parametrize(
    ("meta_template", "expected"),
    [
        (None, "must be a list of dicts"),
        ({"role": "user"}, "must be a list of dicts"),
        ("internlm2", "must be a list of dicts"),
        ([], "no begin and no end"),
        ([*CHATML_META, "user"], r"meta_template\[3\]: must be a dict .*got str"),
        ([{"begin": "x"}], r"meta_template\[0\]: .*missing required field `role`"),
        ([{"role": 1}], r"meta_template\[0\]: expected `str`, got `int` for `role`"),
        (
            [*CHATML_META, {"role": "tool", "end": None}],
            r"meta_template\[3\]: expected `str`, got `null` for `end`",
        ),
        (
            [{"role": "user", "beginn": "x"}],
            r"meta_template\[0\]: .*unknown field `beginn`.*fields are role, begin",
        ),
        ([{"role": "user", "begin": {"named": "x"}}], r"meta_template\[0\]: .*unknown field `named` for `begin`"),
        ([*CHATML_META, {"role": "user"}], r"meta_template\[3\]: role 'user' is there already"),
        ([*CHATML_META, {"role": "tool", "fallback_role": "API"}], r"meta_template\[3\]: fallback_role 'API'"),
        ([{"role": "user", "begin": "U:"}], "does not say which role the model speaks in"),
        (
            [{"role": "a", "begin": "A:", "generate": True}, {"role": "b", "begin": "B:", "generate": True}],
            "marks a, b as generate",
        ),
    ],
)
def test_parse_refused(meta_template: object, expected: str) -> None:
    """What is not a meta template is refused with the entry and the reason."""
    with pytest.raises(InvalidRequestError, match=expected):
        MetaTemplate.parse(meta_template)


def test_parse_api_template() -> None:
    """A template for chat APIs, which marks nobody, is refused because its prompts would be bare text."""
    roles = ("system", "user", "assistant")
    with pytest.raises(InvalidRequestError, match="no begin and no end in any entry"):
        MetaTemplate.parse([{"role": role, "api_role": role} for role in roles])


def test_parse_begin_and_end_are_optional() -> None:
    """An entry needs no begin, no end and no form of begin other than the one in use."""
    meta = [{"role": "user"}, {"role": "assistant", "begin": {"without_name": "\nAnswer:"}, "api_role": "BOT"}]
    assert render(meta, {"role": "user", "content": "2+2?"}) == "2+2?\nAnswer:"


@given(st.lists(st.fixed_dictionaries({"role": contents, "content": contents}, optional={"name": names}), min_size=1))
def test_parse_messages_accepted(conversation: list[dict[str, str | None]]) -> None:
    """Dicts with role, content and an optional name become Messages of the same texts, as do those Messages."""
    parsed = parse_messages(conversation)
    assert parsed == tuple(
        Message(str(entry["role"]), str(entry["content"]), entry.get("name")) for entry in conversation
    )
    assert parse_messages(parsed) == parsed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "messages is empty"),
        (None, "must be a list of dicts with role and content, got NoneType"),
        ("hello", "must be a list of dicts with role and content, got str"),
        ({"role": "user", "content": "hello"}, "must be a list of dicts with role and content, got dict"),
        ([{"role": "user", "content": "hello"}, "hello"], r"messages\[1\]: must be a dict .*got str"),
        ([{"role": "user"}], r"messages\[0\]: .*missing required field `content`"),
        ([{"content": "hello"}], r"messages\[0\]: .*missing required field `role`"),
        ([{"role": "user", "content": 4}], r"messages\[0\]: expected `str`, got `int` for `content`"),
        ([{"role": "user", "content": None}], r"messages\[0\]: expected `str`, got `null` for `content`"),
        ([{"role": None, "content": ""}], r"messages\[0\]: expected `str`, got `null` for `role`"),
        (
            [{"role": "user", "content": "", "name": 1}],
            r"messages\[0\]: expected `str \| null`, got `int` for `name`",
        ),
        ([{"role": "user", "content": "", "text": ""}], r"unknown field `text`; fields are role, content, name"),
        ([{"role": "user", "content": "", 4: ""}], r"messages\[0\]: expected `str`"),
    ],
)
def test_parse_messages_refused(value: object, expected: str) -> None:
    """What is not a conversation is refused with the message's index and the reason."""
    with pytest.raises(InvalidRequestError, match=expected):
        parse_messages(value)


def test_parse_messages_half_a_surrogate_pair() -> None:
    """Text that JSON can spell but UTF-8 cannot is refused at the border."""
    conversation = json.loads(r'[{"role": "user", "content": "\ud83d"}]')
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]: not valid Unicode"):
        parse_messages(conversation)


@given(
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "x"]), st.none() | st.text() | st.integers()))
)
def test_parse_messages_any_dicts(value: list[dict[str, object]]) -> None:
    """Any list of dicts is accepted whole or refused with InvalidRequestError, and nothing else happens."""
    try:
        parsed = parse_messages(value)
    except InvalidRequestError:
        return
    assert [message.content for message in parsed] == [entry["content"] for entry in value]
