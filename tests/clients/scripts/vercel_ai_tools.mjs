// Vercel's AI SDK: tools in two steps, streamed and chosen by name; objects by a schema, whole, streamed, and as a choice.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const packages = createRequire(process.env.MANTA_NODE_PACKAGES + "/");
const { generateObject, generateText, jsonSchema, Output, stepCountIs, streamText, tool } = await import(pathToFileURL(packages.resolve("ai")));
const { createOpenAICompatible } = await import(pathToFileURL(packages.resolve("@ai-sdk/openai-compatible")));

const provider = createOpenAICompatible({
  name: "manta", baseURL: process.env.MANTA_HTTP, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const one = (name, values) => jsonSchema({ type: "object", properties: { [name]: { type: "string", enum: values } }, required: [name], additionalProperties: false });
const tools = {
  get_weather: tool({ description: "Weather of a city.", inputSchema: one("unit", ["C", "F"]), execute: async ({ unit }) => `21 degrees ${unit}` }),
  get_time: tool({ description: "Time of day.", inputSchema: one("zone", ["CET", "UTC"]), execute: async ({ zone }) => `noon ${zone}` }),
};
const asked = { model: provider(process.env.MANTA_MODEL), prompt: "What is the weather in Paris?", temperature: 0, maxOutputTokens: 64, maxRetries: 0 };

const steps = await generateText({
  ...asked, tools, stopWhen: stepCountIs(2), prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "get_weather" } : "none" }),
});
const [call] = steps.steps[0].toolCalls, [result] = steps.steps[0].toolResults;

const stream = streamText({ ...asked, tools, toolChoice: "required" });
const pieces = {};
const called = [];
for await (const part of stream.fullStream) {
  if (part.type === "tool-input-delta") pieces[part.id] = (pieces[part.id] ?? "") + part.delta;
  if (part.type === "tool-call") called.push([part.toolCallId, part.input]);
}

const schema = jsonSchema({
  type: "object", required: ["city", "millions"], additionalProperties: false,
  properties: { city: { type: "string", enum: ["Paris", "London"] }, millions: { type: "integer", minimum: 0, maximum: 9 } },
});
const { object } = await generateObject({ ...asked, schema });
const { output } = await generateText({ ...asked, output: Output.object({ schema }) });
const partly = streamText({ ...asked, output: Output.object({ schema }) });
let last = null;
for await (const some of partly.partialOutputStream) last = some;
const { output: choice } = await generateText({ ...asked, output: Output.choice({ options: ["sunny", "rainy"] }) });

console.log(JSON.stringify({
  "called": [call.toolName, Object.keys(call.input), ["C", "F"].includes(call.input.unit)],
  "got": result.output === `21 degrees ${call.input.unit}`,
  "then": [steps.steps.length, steps.text.length > 0],
  "streamed": called.length > 0 && called.every(([id, input]) => JSON.stringify(JSON.parse(pieces[id])) === JSON.stringify(input)),
  "objects": [object, output, last].map((some) => ["Paris", "London"].includes(some.city) && Number.isInteger(some.millions)),
  "choice": ["sunny", "rainy"].includes(choice),
}));
