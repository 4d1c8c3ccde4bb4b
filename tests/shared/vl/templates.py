"""Chat templates that write, for text and images, what the templates of the published models write."""

CONTENT = """\
{%- macro content(message, image, video='') -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ image }}{%- elif item['type'] == 'video' -%}{{ video }}
{%- elif item['type'] == 'text' -%}{{ item['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# Images stand before all text of a turn, content is a list, and no end of sequence follows an answer.
LLAVA = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}
{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ item['text'] + ' ' }}{%- endgeneration -%}
{%- else -%}{{ item['text'] + ' ' }}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

# A space and a line break follow the role in a turn, the line break alone where an answer is asked for.
LLAVA_ONEVISION = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + ' ' }}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'video' -%}{{ '<video>' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}
{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ '\\n' + item['text'] }}{%- endgeneration -%}
{%- else -%}{{ '\\n' + item['text'] }}{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

FAST_VLM = """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}{{ '\\n' + item['text'] }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Turns alternate, a system turn goes into the first question, and the assistant is called model.
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] -%}
{%- set prefix, turns = system + '\\n\\n', messages[1:] -%}
{%- else -%}
{%- set prefix, turns = '', messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- prefix if loop.first else '' }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- else -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# A conversation without images gets a system turn, one with images must not have any.
MLLAMA = """\
{%- set pictures = namespace(any=false) -%}
{%- for message in messages -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{%- set pictures.any = true -%}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
{%- set system, turns = '', messages -%}
{%- endif -%}
{%- if pictures.any and system -%}
{{ raise_exception('Prompting with images is incompatible with system messages.') }}
{%- endif -%}
{%- if not pictures.any -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}
{%- endif -%}
{%- for message in turns -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- content(message, '<|image|>') + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
MLLAMA = CONTENT + MLLAMA


def chatml(image: str, system: str | None = None) -> str:
    """ChatML as Qwen and InternVL write it.

    Args:
        image: What stands for an image.
        system: The system turn of conversations that start without one; None: they get none.

    A video is written as an image is, by its own token.
    """
    video = image.replace("image", "video").replace("IMAGE", "VIDEO").replace("<IMG_CONTEXT>", "<video>")
    default = f"<|im_start|>system\\n{system}<|im_end|>\\n"
    first = "" if system is None else "{%- if messages[0]['role'] != 'system' -%}{{ '" + default + "' }}{%- endif -%}"
    return (
        CONTENT
        + first
        + "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + "{{ content(message, '"
        + image
        + ("', '" + video if "video" in video.lower() else "")
        + "') + '<|im_end|>\\n' }}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def idefics(begin: str) -> str:
    """Idefics3's and SmolVLM's: a space follows the colon of a turn, unless an image does or an answer is asked for."""
    return (
        CONTENT
        + "{{ '"
        + begin
        + "' }}{%- for message in messages -%}{{ message['role'] | capitalize }}"
        + "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
        + "{{ content(message, '<image>', '<video>') + '<end_of_utterance>\\n' }}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
    )


# Qwen3.5's way: an answer is asked for inside a thought; those in front of the last question lose theirs.
QWEN3_5 = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set said = content(message, '<|vision_start|><|image_pad|><|vision_end|>') | trim -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- set thought = '' -%}
{%- if '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] | trim -%}
{%- set said = said.split('</think>')[-1] | trim -%}
{%- endif -%}
{%- if loop.index0 > last.user -%}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
{{ said + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}
"""
QWEN3_5 = CONTENT + QWEN3_5

# GLM's way: a turn ends where the token of the next role begins another one.
GLM = """\
[gMASK]<sop>
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + content(message, '<|image|>') }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""
GLM = CONTENT + GLM

# Pixtral's way: texts of content lists have another key, and a system turn stands in front of the last question.
PIXTRAL = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
{%- set system, turns = none, messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{ '[INST]' }}
{%- if loop.last and system -%}{{ system + '\\n\\n' }}{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}{{ '[IMG]' if item['type'] == 'image' else item['content'] }}{%- endfor -%}
{%- endif -%}
{{ '[/INST]' }}
{%- else -%}{{ message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

# Llama 3.2 Vision's way: the system turn is text, which a content list is printed as.
LLAMA3_2 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set system, turns = messages[0]['content'] | trim, messages[1:] -%}
{%- else -%}
{%- set system, turns = '', messages -%}
{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- for message in turns -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- content(message, '<|image|>') + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
LLAMA3_2 = CONTENT + LLAMA3_2

# A template of texts alone: content is put between other texts, so that a list of pieces is an error.
TEXT = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# The day is in all rows, as in Llama 3.2's, or in those without a system turn, as in Mistral Small 3.1's, and with the
# time of the day.
DATED = {
    "llama": """\
{%- if not date_string is defined -%}
{%- if strftime_now is defined -%}{%- set date_string = strftime_now("%d %b %Y") -%}
{%- else -%}{%- set date_string = "26 Jul 2024" -%}{%- endif -%}
{%- endif -%}
{{ '<|im_start|>system\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '<|im_end|>\\n' }}
""",
    "mistral": """\
{%- set today = strftime_now("%Y-%m-%d") -%}
{%- set default_system_message = "The current date is " + today + "." -%}
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\n' + default_system_message + '<|im_end|>\\n' }}
{%- endif -%}
""",
    "hour": """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nIt is ' + strftime_now("%A, %B %-d, %Y, %H:%M:%S") + '.<|im_end|>\\n' }}
{%- endif -%}
""",
}
DATED = {name: template + TEXT for name, template in DATED.items()}

# Contents are texts, images their tokens in them, and an end of sequence follows a conversation that asks for nothing.
PHI_4 = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor -%}
{{ '<|assistant|>' if add_generation_prompt else eos_token }}
"""
