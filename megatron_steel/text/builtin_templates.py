r"""Chat templates by name, as Jinja with ``{% generation %}`` around what is trained by default.

Where a model family publishes a template, the text is the one of its published tokenizer (the tests compare them):
ChatML is Qwen's; ``qwen2``, ``qwen2.5`` and ``qwen3`` are those of their releases; ``llama3`` that of Llama 3 with the
tool use of Llama 3.1; ``mistral`` that of Mistral Instruct (v1 without, v3 with control tokens for ``[INST]``).
``alpaca`` is Stanford Alpaca's as LLaMA-Factory writes turns; ``open_llama`` and ``mini_qwen`` are those of these
projects; ``glm4`` that of GLM-4; ``plain`` adds nothing but the end token of an answer.

The newline behind ``<|im_end|>`` is outside of the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

TOOLS_HEAD = (
    r"# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    r"You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    r"\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    r"<tool_call></tool_call> XML tags:\n<tool_call>\n"
    r"{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>"
)

CHATML_SYSTEM = f"""\
{{%- set has_system = messages[0].role == "system" %}}
{{%- set system = messages[0].content if has_system else default_system %}}
{{%- if tools %}}
    {{{{- "<|im_start|>system\\n" + (system + "\\n\\n" if system else "") + "{TOOLS_HEAD}" }}}}
    {{%- for tool in tools %}}
        {{{{- "\\n" + tool | tojson }}}}
    {{%- endfor %}}
    {{{{- "{TOOLS_TAIL}<|im_end|>\\n" }}}}
{{%- elif system or has_system %}}
    {{{{- "<|im_start|>system\\n" + system + "<|im_end|>\\n" }}}}
{{%- endif %}}
"""

CHATML_CALLS = """\
        {%- for call in message.tool_calls or [] %}
            {{- "\\n" if content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- "}\\n</tool_call>" }}
        {%- endfor %}
"""

CHATML_OTHERS = """\
    {%- elif message.role == "tool" %}
        {{- "<|im_start|>user" if loop.first or messages[loop.index0 - 1].role != "tool" }}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {{- "<|im_end|>\\n" if loop.last or messages[loop.index0 + 1].role != "tool" }}
    {%- elif message.role == "user" or not loop.first %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

CHATML_ANSWER = """\
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {{- "<|im_start|>assistant\\n" }}
        {%- generation %}
        {{- content }}
"""

CHATML_END = """\
        {{- "<|im_end|>" }}
        {%- endgeneration %}
        {{- "\\n" }}
"""


def chatml(default_system: str = "") -> str:
    """ChatML with the tool use of Qwen2.5; with a system turn if a conversation has one or there is a default."""
    default = f'{{%- set default_system = "{default_system}" %}}\n'
    return default + CHATML_SYSTEM + CHATML_ANSWER + CHATML_CALLS + CHATML_END + CHATML_OTHERS


# Thoughts are shown after the last question only. The block stands there even when empty: a model that does not think
# has to know it, and so it is trained.
QWEN3_ANSWER = """\
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages | reverse %}
    {%- set reply = message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>") %}
    {%- if message.role == "user" and not ns.found and not reply %}
        {%- set ns.last = loop.revindex0 %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set thought = "" %}
        {%- set content = message.content %}
        {%- if "</think>" in content %}
            {%- set thought = content.split("</think>")[0].rstrip("\\n").split("<think>")[-1].strip("\\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- generation %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {%- set content = content.lstrip("\\n") %}
            {{- "<think>\\n" + thought + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- content }}
"""

QWEN3 = '{%- set default_system = "" %}\n' + CHATML_SYSTEM + QWEN3_ANSWER + CHATML_CALLS + CHATML_END + CHATML_OTHERS

LLAMA3_TOOLS = (
    r"Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    r"best answers the given prompt.\n\nRespond in the format "
    r"{\"name\": function name, \"parameters\": dictionary of argument name and its value}.Do not use variables.\n\n"
)
LLAMA3 = f"""\
{{{{- bos_token }}}}
{{%- set ns = namespace(tools=tools) %}}
{{%- for message in messages %}}
    {{%- if message.role == "assistant" %}}
        {{{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}}}
        {{%- generation %}}
        {{%- if message.tool_calls %}}
            {{%- if message.tool_calls | length != 1 or message.content | trim %}}
                {{{{- raise_exception("a turn is either text or one tool call") }}}}
            {{%- endif %}}
            {{%- set call = message.tool_calls[0].function %}}
            {{{{- '{{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}}" }}}}
        {{%- else %}}
            {{{{- message.content | trim }}}}
        {{%- endif %}}
        {{{{- "<|eot_id|>" }}}}
        {{%- endgeneration %}}
    {{%- elif message.role == "tool" %}}
        {{{{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson + "<|eot_id|>" }}}}
    {{%- else %}}
        {{{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}}}
        {{%- if ns.tools and message.role == "user" %}}
            {{{{- "{LLAMA3_TOOLS}" }}}}
            {{%- for tool in ns.tools %}}
                {{{{- tool | tojson(indent=4) + "\\n\\n" }}}}
            {{%- endfor %}}
            {{%- set ns.tools = none %}}
        {{%- endif %}}
        {{{{- message.content | trim + "<|eot_id|>" }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}}}
{{%- endif %}}
"""


def mistral(space: str) -> str:
    """Mistral Instruct; ``space`` stands before ``[/INST]``. A system text goes before the first question."""
    return f"""\
{{{{- bos_token }}}}
{{%- set ns = namespace(system="") %}}
{{%- for message in messages %}}
    {{%- if message.role == "system" %}}
        {{%- set ns.system = message.content + "\\n\\n" %}}
    {{%- elif message.role == "user" %}}
        {{{{- "[INST] " + ns.system + message.content + "{space}[/INST]" }}}}
        {{%- set ns.system = "" %}}
    {{%- else %}}
        {{%- generation %}}
        {{{{- " " + message.content + eos_token }}}}
        {{%- endgeneration %}}
    {{%- endif %}}
{{%- endfor %}}
"""


def turns(system: str, user: str, answer: str, header: str, after: str = "") -> str:
    """A template that writes each turn by one expression over ``content``; ``header`` stands before an answer."""
    return f"""\
{{%- for message in messages %}}
    {{%- set content = message.content %}}
    {{%- if message.role == "assistant" %}}
        {{{{- {header} }}}}
        {{%- generation %}}
        {{{{- {answer} }}}}
        {{%- endgeneration %}}
        {{{{- {after or '""'} }}}}
    {{%- elif message.role == "user" %}}
        {{{{- {user} }}}}
    {{%- else %}}
        {{{{- {system} }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- {header} }}}}
{{%- endif %}}
"""


ALPACA_SYSTEM = (
    r"Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ALPACA = f'{{{{- "{ALPACA_SYSTEM}" if messages[0].role != "system" }}}}\n' + turns(
    r'content + "\n\n"',
    r'"### Instruction:\n" + content + "\n\n"',
    "content + eos_token",
    r'"### Response:\n"',
    r'"\n\n"',
)


@dataclass(kw_only=True, frozen=True, slots=True)
class BuiltIn:
    """A template by name."""

    source: str
    controls: tuple[str, ...] = ()
    """Tokens the tokenizer must have."""
    efficient_eos: bool = False
    """An answer has no end token: in place of the token after it, the end token is to be predicted."""
    trains_prompt: bool = False
    """All tokens are trained, not those of answers alone."""


CHATML_CONTROLS = ("<|im_start|>", "<|im_end|>")
LLAMA3_CONTROLS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GLM4_CONTROLS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

BUILT_IN = {
    "chatml": BuiltIn(source=chatml(), controls=CHATML_CONTROLS),
    "qwen2": BuiltIn(source=chatml("You are a helpful assistant."), controls=CHATML_CONTROLS),
    "qwen2.5": BuiltIn(source=chatml(QWEN25_SYSTEM), controls=CHATML_CONTROLS),
    "qwen3": BuiltIn(source=QWEN3, controls=CHATML_CONTROLS),
    "llama3": BuiltIn(source=LLAMA3, controls=LLAMA3_CONTROLS),
    "mistral": BuiltIn(source=mistral(" ")),
    "alpaca": BuiltIn(source=ALPACA),
    "open_llama": BuiltIn(
        source=turns(r'content + "\n"', r'"user:" + content + "\n"', "content + eos_token", '"system:"'),
        trains_prompt=True,
    ),
    "mini_qwen": BuiltIn(
        source=turns(
            'raise_exception("mini_qwen has no system turn")',
            r'"<|im_start|>user\n" + content + "<|im_end|>\n"',
            'content + "<|im_end|>"',
            r'"<|im_start|>assistant\n"',
        ),
        controls=CHATML_CONTROLS,
    ),
    "glm4": BuiltIn(
        source='{{- "[gMASK]<sop>" }}\n'
        + turns(r'"<|system|>\n" + content', r'"<|user|>\n" + content', r'"\n" + content', '"<|assistant|>"'),
        controls=GLM4_CONTROLS,
        efficient_eos=True,
    ),
    "plain": BuiltIn(source=turns("content", "content", "content + eos_token", '""')),
}
# For a tokenizer in which the brackets are control tokens.
MISTRAL_V3 = mistral("")
