"""A tool parser for vLLM's OpenAI server: <tool_call> JSON becomes tool_calls, <answer> content.

    python -m vllm.entrypoints.openai.api_server --model CHECKPOINT --generation-config vllm \\
        --enable-auto-tool-choice --tool-parser-plugin tools/vllm_tool_parser.py \\
        --tool-call-parser toolupt

What a response may hold, and what the client sees of it:

    <tool_call>{"name", "params"} or a list of these</tool_call>   tool_calls, when the block ends
    <answer>text</answer>                                          content, as it comes
    a block that is no such JSON, or is cut off                    its text, as content
    anything else                                                  content
    <think>thoughts</think> at the start                           nothing

Thoughts are dropped for a model trained with --allow_thinking, whose tokenizer_config.json says so;
a block that never ends is all thoughts. Tags never reach the client, nor does a tag that was cut
off; white space at both ends of the content is dropped. A </tool_call> inside a JSON string does
not end a block. tool_choice "none" keeps content only. "required" or a named function are parsed
like "auto": a call is not enforced.

Copy this file on its own: it needs vLLM only, 0.32 or later.
"""

import json

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAGS = (OPEN, CLOSE, "<answer>", "</answer>")
THINK, THOUGHT = "<think>", "</think>"


class Reader:
    """Reads a response piece by piece, however it is cut.

    Outside a block every tag is removed. Removing one may join what stands around it to another, as
    in <ans<answer>wer>: hence what may yet become a tag is held back.
    """

    def __init__(self, opening: str | None = None) -> None:
        """opening: what the prompt has written of a block of thoughts; None: there are none."""
        self.thoughts = opening  # text of what may be such a block; None: it is over
        self.content = ""  # without tags
        self.sent = 0  # characters of it that went out
        self.block: str | None = None  # text after <tool_call>

    def feed(self, text: str) -> tuple[str, list[dict]]:
        """Return the content and the calls that `text` completes."""
        calls = []
        for character in self._said(text):
            if self.block is None:
                self.block = "" if self._add(character) == OPEN else None
                continue
            self.block += character
            if self.block.endswith(CLOSE):
                found = read_calls(self.block.removesuffix(CLOSE))
                if found:
                    calls += found
                    self.block = None
        return self._new(), calls

    def finish(self) -> str:
        """Return the content that was still held back, when the response is over."""
        for character in self.block or "":
            self._add(character)
        return self._new(over=True)

    def _said(self, text: str) -> str:
        """Return what comes after the thoughts, "" as long as it may still be one of them."""
        if self.thoughts is None:
            return text
        self.thoughts += text
        begun = self.thoughts.lstrip()
        if begun.startswith(THINK):
            _, ended, text = begun.partition(THOUGHT)
        else:
            ended, text = not THINK.startswith(begun), self.thoughts
        if not ended:
            return ""
        self.thoughts = None
        return text

    def _add(self, character: str) -> str | None:
        """Add to the content; return the tag that this completes, which is removed."""
        self.content += character
        for tag in TAGS:
            if self.content.endswith(tag):
                self.content = self.content.removesuffix(tag)
                return tag
        return None

    def _new(self, over: bool = False) -> str:
        """Return the content that has not gone out, stripped, without beginnings of tags."""
        text, single = self.content, 0
        begins_tag = lambda end: any(tag.startswith(end) for tag in TAGS)
        while (start := text.rfind("<")) >= 0 and begins_tag(text[start:]):
            single += text[start:] == "<"
            text = text[:start]
        if over:  # beginnings of tags are dropped, but a single "<" is text
            text += "<" * single
        text = text.strip()
        begin, self.sent = self.sent, len(text)
        return text[begin:]


def read_calls(block: str) -> list[dict] | None:
    """Return the calls of a block, each with name and params; None if it is no such JSON."""
    try:
        calls = json.loads(block)
        json.dumps(
            calls, ensure_ascii=False, allow_nan=False
        ).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        if not isinstance(call.get("params"), dict):
            return None
    return calls or None


class ToolUPTParser(ToolParser):
    """The Reader behind vLLM's interface; one instance per response."""

    # A required or named choice is not forced into JSON of vLLM's own, which this model never saw.
    supports_required_and_named = False
    # Otherwise vLLM returns the raw text, tags included, where a response holds no call.
    engine_based_streaming = True

    def __init__(self, tokenizer, tools=None) -> None:
        super().__init__(tokenizer, tools)
        self.opening = getattr(tokenizer, "init_kwargs", {}).get("thought_opening")
        self.reader = Reader(self.opening)

    def adjust_request(self, request):
        """Have the tags decoded: a tokenizer may count them among its special tokens."""
        request.skip_special_tokens = False
        return super().adjust_request(request)

    def extract_tool_calls(self, model_output, request) -> ExtractedToolCallInformation:
        """Read a whole response."""
        reader = Reader(self.opening)
        content, calls = reader.feed(model_output)
        content += reader.finish()
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[_tool_call(call) for call in calls],
            content=content or None,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text,
        current_text,
        delta_text,
        previous_token_ids,
        current_token_ids,
        delta_token_ids,
        request,
    ) -> DeltaMessage | None:
        """Read the next piece of a response."""
        content, calls = self.reader.feed(delta_text)
        deltas = [self._delta(call) for call in calls]
        if not content and not deltas:
            return None
        return DeltaMessage(content=content or None, tool_calls=deltas)

    def finish_streaming(self) -> DeltaMessage | None:
        """Return what was held back, when a streamed response is over."""
        content = self.reader.finish()
        return DeltaMessage(content=content) if content else None

    def _delta(self, call: dict) -> DeltaToolCall:
        made, index = _tool_call(call), len(self.prev_tool_call_arr)
        # What these two lists differ by, nothing here, vLLM sends when a response is over.
        self.prev_tool_call_arr.append({"name": call["name"], "arguments": call["params"]})
        self.streamed_args_for_tool.append(made.function.arguments)
        function = DeltaFunctionCall(name=call["name"], arguments=made.function.arguments)
        return DeltaToolCall(index=index, id=made.id, type="function", function=function)


def _tool_call(call: dict) -> ToolCall:
    arguments = json.dumps(call["params"], ensure_ascii=False)
    return ToolCall(function=FunctionCall(name=call["name"], arguments=arguments))


ToolParserManager.register_module("toolupt", module=ToolUPTParser)
