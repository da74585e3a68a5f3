// Vercel's AI SDK with its OpenAI-compatible provider: generateText and streamText.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const packages = createRequire(process.env.MANTA_NODE_PACKAGES + "/");
const { generateText, streamText } = await import(pathToFileURL(packages.resolve("ai")));
const { createOpenAICompatible } = await import(pathToFileURL(packages.resolve("@ai-sdk/openai-compatible")));

const provider = createOpenAICompatible({ name: "manta", baseURL: process.env.MANTA_HTTP, apiKey: "none", includeUsage: true });
const asked = { model: provider(process.env.MANTA_MODEL), prompt: "What is the capital of France?", temperature: 0, maxOutputTokens: 16, maxRetries: 0 };
const { text, usage, finishReason } = await generateText(asked);
const stream = streamText(asked);
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;
console.log(JSON.stringify({ text, streamed, usage: [usage.totalTokens, (await stream.usage).totalTokens], finishReason }));
