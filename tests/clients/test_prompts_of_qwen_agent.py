"""What the server writes of tools for Qwen-Agent's protocol is what that package itself writes, to the letter."""

import json
import subprocess

import pytest

from serve.tools import qwen_agent
from tests.clients import environments

pytestmark = pytest.mark.slow

FUNCTION = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASK = """
import json, sys
from qwen_agent.llm.fncall_prompts import qwen_fncall_prompt as theirs
function = json.loads(sys.argv[1])
described = theirs.get_function_description(function, "en")
told = {kind: theirs.FN_CALL_TEMPLATE[kind].format(tool_descs=described, tool_names=function["name"]) for kind in ("en", "en_parallel")}
print(json.dumps(told))
"""


def test_tools_are_told_of_in_its_own_words() -> None:
    if not environments.is_made("qwen_agent"):
        pytest.skip("run `python -m tests.clients.environments qwen_agent`")
    command = [*environments.interpreter("qwen_agent"), "-c", ASK, json.dumps(FUNCTION)]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    described = qwen_agent.TOOL.format(
        name=FUNCTION["name"], description=FUNCTION["description"], parameters=json.dumps(FUNCTION["parameters"], ensure_ascii=False)
    )
    for kind, how in (("en", qwen_agent.ONE), ("en_parallel", qwen_agent.PARALLEL)):
        assert qwen_agent.TOOLS.format(descriptions=described) + how.format(names=FUNCTION["name"]) == theirs[kind]
