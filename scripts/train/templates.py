"""The chat templates of the embedded checkpoints, for other programs. They render plain turns as published."""

from deepseek_v3.tokenizer import ASSISTANT, BOS, EOS, USER

QWEN3_TEMPLATE = """\
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if ns.question >= 0 and loop.index0 > ns.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
DEEPSEEK_TEMPLATE = """\
{{- '<bos>' }}
{%- set ns = namespace(system=[]) %}
{%- for message in messages %}{% if message.role == 'system' %}\
{% set ns.system = ns.system + [message.content] %}{% endif %}{% endfor %}
{{- ns.system | join('\\n\\n') }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<user>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<assistant></think>' + message.content.split('</think>', 1)[-1] + '<eos>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant><think>' if thinking is defined and thinking else '<assistant></think>' }}
{%- endif %}"""
for short, name in (("<bos>", BOS), ("<eos>", EOS), ("<user>", USER), ("<assistant>", ASSISTANT)):
    DEEPSEEK_TEMPLATE = DEEPSEEK_TEMPLATE.replace(short, name)
TEMPLATES = {"qwen3": QWEN3_TEMPLATE, "qwen3_moe": QWEN3_TEMPLATE, "deepseek_v3": DEEPSEEK_TEMPLATE}
