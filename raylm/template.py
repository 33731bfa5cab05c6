"""Meta templates: how a conversation becomes the text of a prompt.

A meta template is a list of dicts, one a role, in the form of lagent: `role`, `begin` (the text before the content of a
message) and `end` (the text after it). `INTERNLM2_META` below is one. For a role in which several speakers take part,
`begin` is itself a dict with the begin of messages `with_name` and `without_name`.

Source: lagent 0.2, `lagent.llms.meta_template` and `lagent.llms.base_llm.LMTemplateParser`. What that parser drops
silently or fails on half-way, such as a name that the role has no place for, is an InvalidRequestError here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from raylm.errors import InvalidRequestError
from raylm.messages import Message

StructT = TypeVar("StructT", bound=msgspec.Struct)

_TOOLS = {"interpreter": "<|interpreter|>", "plugin": "<|plugin|>"}

INTERNLM2_META: list[dict[str, Any]] = [
    {
        "role": "system",
        "begin": {
            "with_name": "<|im_start|>system name={name}\n",
            "without_name": "<|im_start|>system\n",
            "name": _TOOLS,
        },
        "end": "<|im_end|>\n",
    },
    {
        "role": "user",
        "begin": {"with_name": "<|im_start|>user name={name}\n", "without_name": "<|im_start|>user\n"},
        "end": "<|im_end|>\n",
    },
    {
        "role": "assistant",
        "begin": {
            "with_name": "<|im_start|>assistant name={name}\n",
            "without_name": "<|im_start|>assistant\n",
            "name": _TOOLS,
        },
        "end": "<|im_end|>\n",
    },
    {
        "role": "environment",
        "begin": {
            "with_name": "<|im_start|>environment name={name}\n",
            "without_name": "<|im_start|>environment\n",
            "name": _TOOLS,
        },
        "end": "<|im_end|>\n",
    },
]
"""InternLM2 chat models. Source: lagent 0.2, `lagent.llms.meta_template.INTERNLM2_META`."""

CHATML_META: list[dict[str, Any]] = [
    {"role": "system", "begin": "<|im_start|>system\n", "end": "<|im_end|>\n"},
    {"role": "user", "begin": "<|im_start|>user\n", "end": "<|im_end|>\n"},
    {"role": "assistant", "begin": "<|im_start|>assistant\n", "end": "<|im_end|>\n"},
]
"""Models that were trained on plain ChatML, such as SmolLM2 and Qwen2.5. Their own templates put a default system
message before a conversation that has none; this one adds nothing."""


class NamedBegin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The begin of a role in which several speakers take part.

    Attributes:
        with_name: Begin of a message with a name, which takes the place of `{name}` in it. None: the role takes no
            name.
        without_name: Begin of a message without a name.
        name: How to spell some of the names; others stand as they are.
    """

    with_name: str | None = None
    without_name: str = ""
    name: dict[str, str] = {}


class RoleTemplate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a meta template.

    Attributes:
        role: The role that it is for.
        begin: Goes before the content.
        end: Goes after the content.
        generate: This is the role that the model speaks in. A conversation that ends with a message of this role is
            left open, without `end`, and the model goes on with that message.
        fallback_role: Messages of this role are rendered as those of that one.
        api_role: The role's name at a chat API. Accepted because lagent's lists may carry it; a prompt has no use
            for it.
    """

    role: str
    begin: str | NamedBegin = ""
    end: str = ""
    generate: bool = False
    fallback_role: str | None = None
    api_role: str | None = None

    @property
    def unnamed_begin(self) -> str:
        """The begin of a message without a name."""
        return self.begin if isinstance(self.begin, str) else self.begin.without_name

    def named_begin(self, name: str) -> str | None:
        """Return the begin of a message by speaker `name`, or None when this role has no place for a name."""
        if isinstance(self.begin, str) or self.begin.with_name is None:
            return None
        return self.begin.with_name.replace("{name}", self.begin.name.get(name, name))


class MetaTemplate(msgspec.Struct, frozen=True):
    """A checked meta template. Made by `parse`.

    Attributes:
        roles: The entry that renders each role.
        generating: The entry of the role that the model speaks in: the one marked `generate`, else `assistant`.
    """

    roles: Mapping[str, RoleTemplate]
    generating: RoleTemplate

    @classmethod
    def parse(cls, meta_template: object) -> MetaTemplate:
        """Check a meta template as lagent's users write it.

        Args:
            meta_template: A list of dicts, one a role.

        Raises:
            InvalidRequestError: it is not one. The text names the entry.
        """
        if not isinstance(meta_template, list | tuple):
            raise InvalidRequestError(
                f"meta_template must be a list of dicts, such as INTERNLM2_META, got {type(meta_template).__name__}"
            )
        roles: dict[str, RoleTemplate] = {}
        for index, item in enumerate(meta_template):
            where = f"meta_template[{index}]"
            entry = _convert(item, RoleTemplate, where)
            if entry.role in roles:
                raise InvalidRequestError(f"{where}: role {entry.role!r} is there already; give each role one entry")
            roles[entry.role] = entry
        for index, entry in enumerate(roles.values()):
            if entry.fallback_role is not None and entry.fallback_role not in roles:
                raise InvalidRequestError(
                    f"meta_template[{index}]: fallback_role {entry.fallback_role!r} has no entry; "
                    f"roles are {', '.join(roles)}"
                )
        if not any(entry.begin or entry.end for entry in roles.values()):
            raise InvalidRequestError(
                "meta_template has no begin and no end in any entry, so a prompt would not show who said what; "
                "leave it out to use the model's own chat template"
            )
        return cls(
            roles={role: roles[entry.fallback_role or role] for role, entry in roles.items()},
            generating=_generating(roles),
        )

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the model goes on from.

        The prompt of a conversation is a prefix of the prompt of that conversation with an unnamed reply and whatever
        follows it, which is what an engine's prefix cache lives on.

        Args:
            messages: The conversation. When its last message is not the model's own, the prompt ends with the begin of
                the model's role.

        Raises:
            InvalidRequestError: a role that this template does not have, or a name where a role takes none.
        """
        parts: list[str] = []
        speaker: RoleTemplate | None = None
        for index, message in enumerate(messages):
            speaker = self.roles.get(message.role)
            if speaker is None:
                raise InvalidRequestError(
                    f"messages[{index}]: unknown role {message.role!r}; roles are {', '.join(self.roles)}"
                )
            begin = speaker.unnamed_begin if message.name is None else speaker.named_begin(message.name)
            if begin is None:
                raise InvalidRequestError(
                    f"messages[{index}]: this meta template has no place for the name {message.name!r} of a "
                    f"{message.role} message; leave the name out, or give the role a begin with with_name"
                )
            parts += begin, message.content, speaker.end
        if speaker is not self.generating:
            parts.append(self.generating.unnamed_begin)
        elif speaker.generate:
            parts.pop()
        return "".join(parts)


def _generating(roles: Mapping[str, RoleTemplate]) -> RoleTemplate:
    """Return the entry of the role that the model speaks in."""
    marked = [entry for entry in roles.values() if entry.generate]
    if len(marked) > 1:
        raise InvalidRequestError(
            f"meta_template marks {', '.join(entry.role for entry in marked)} as generate; the model speaks in one role"
        )
    if marked:
        return marked[0]
    if "assistant" not in roles:
        raise InvalidRequestError(
            "meta_template does not say which role the model speaks in; add an assistant or mark a role as generate"
        )
    return roles["assistant"]


def parse_messages(value: object) -> tuple[Message, ...]:
    """Check a conversation as users pass it.

    Args:
        value: A list of dicts with `role`, `content` and, if need be, `name`; or of Messages. Roles are checked where
            the conversation is rendered.

    Raises:
        InvalidRequestError: it is not that. The text names the message and what is wrong with it.
    """
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"messages must be a list of dicts with role and content, got {type(value).__name__}")
    if not value:
        raise InvalidRequestError("messages is empty; give at least one, such as {'role': 'user', 'content': '...'}")
    return tuple(_parse_message(item, f"messages[{index}]") for index, item in enumerate(value))


def _parse_message(item: object, where: str) -> Message:
    message = _convert(item, Message, where)
    try:
        for text in (message.role, message.content, message.name or ""):
            text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, and Python keeps it; no tokenizer and no wire takes it.
        raise InvalidRequestError(f"{where}: not valid Unicode: {error}; clean the text first") from None
    return message


def _convert(item: object, kind: type[StructT], where: str) -> StructT:
    """Turn one dict of a user's list into `kind`."""
    fields = ", ".join(kind.__struct_fields__)
    if not isinstance(item, dict | kind):
        raise InvalidRequestError(f"{where}: must be a dict with fields from {fields}; got {type(item).__name__}")
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        reason = str(error).replace(" - at `$.", " for `")
        raise InvalidRequestError(f"{where}: {reason[:1].lower()}{reason[1:]}; fields are {fields}") from None


def named_template(template: str | Sequence[Mapping[str, Any]] | None) -> MetaTemplate | None:
    """Return the template that a configuration names (`internlm2`, `chatml`) or spells out.

    Raises:
        InvalidRequestError: it is not in lagent's form.
    """
    if template is None:
        return None
    named = {"internlm2": INTERNLM2_META, "chatml": CHATML_META}
    return MetaTemplate.parse(named[template] if isinstance(template, str) else template)
