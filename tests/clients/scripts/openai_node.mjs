// openai-node: whole, streamed (iterated and by its helper), completions, models, an error.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const packages = createRequire(process.env.MANTA_NODE_PACKAGES + "/");
const { default: OpenAI } = await import(pathToFileURL(packages.resolve("openai")));

const model = process.env.MANTA_MODEL;
const client = new OpenAI({ baseURL: process.env.MANTA_HTTP, apiKey: "none", maxRetries: 0 });
const asked = { model, messages: [{ role: "user", content: "What is the capital of France?" }], temperature: 0, max_tokens: 16 };
const whole = await client.chat.completions.create(asked);
let streamed = "", usage = null;
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const helper = (await client.chat.completions.stream(asked).finalChatCompletion()).choices[0].message.content;
const completion = await client.completions.create({ model, prompt: "The capital of France is", temperature: 0, max_tokens: 8 });
const parameters = { type: "object", properties: { unit: { type: "string", enum: ["C", "F"] } }, required: ["unit"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "get_weather", description: "Weather of a city.", parameters } }];
const forced = { ...asked, max_tokens: 64, tools, tool_choice: { type: "function", function: { name: "get_weather" } }, parallel_tool_calls: false };
const [call] = (await client.chat.completions.create(forced)).choices[0].message.tool_calls;
const [streamedCall] = (await client.chat.completions.stream(forced).finalChatCompletion()).choices[0].message.tool_calls;
const called = [call.function.name, Object.keys(JSON.parse(call.function.arguments)), streamedCall.function.arguments === call.function.arguments];
let refused = null;
try {
  await client.chat.completions.create({ ...asked, temperature: 3 });
} catch (error) {
  refused = [error.status, error.param];
}
const models = [];
for await (const one of client.models.list()) models.push(one.id);
console.log(JSON.stringify({
  text: whole.choices[0].message.content, streamed, helper, usage: [whole.usage.total_tokens, usage.total_tokens],
  completion: completion.choices[0].text, models, refused, called,
}));
