// Load by k6: many clients at once over HTTP (streams and whole answers) and over gRPC (both again, found by reflection).
import { check } from "k6";
import http from "k6/http";
import { Counter } from "k6/metrics";
import grpc from "k6/net/grpc";

const MODEL = __ENV.MANTA_MODEL, TOKENS = 16, EACH = Number(__ENV.MANTA_ITERATIONS);
const whole = new Counter("whole"), refused = new Counter("refused");
const scenario = (exec) => ({ executor: "shared-iterations", vus: 8, iterations: EACH, maxDuration: "8m", exec });

export const options = {
  scenarios: { http_stream: scenario("httpStream"), http_whole: scenario("httpWhole"), grpc_stream: scenario("grpcStream"), grpc_whole: scenario("grpcWhole") },
  thresholds: { checks: ["rate==1"], http_req_failed: ["rate==0"], whole: [`count==${4 * EACH}`] },
};

const asked = (more) => JSON.stringify({
  model: MODEL, messages: [{ role: "user", content: `Count from ${__ITER} upwards.` }], max_tokens: TOKENS, ignore_eos: true, seed: __ITER, ...more,
});
const json = { headers: { "content-type": "application/json" }, timeout: "120s" };
const client = new grpc.Client();
let connected = false;

function took(name, ok) {
  check(null, { [name]: () => ok });
  (ok ? whole : refused).add(1);
}

export function httpStream() {
  const answer = http.post(`${__ENV.MANTA_HTTP}/chat/completions`, asked({ stream: true, stream_options: { include_usage: true } }), json);
  const events = answer.body.trim().split("\n\n");
  const ended = events.pop() === "data: [DONE]";
  const chunks = events.map((event) => JSON.parse(event.slice("data: ".length)));
  const finished = chunks.filter((chunk) => chunk.choices.length && chunk.choices[0].finish_reason === "length").length === 1;
  took("an HTTP stream is whole", answer.status === 200 && ended && finished && chunks[chunks.length - 1].usage.completion_tokens === TOKENS);
}

export function httpWhole() {
  const answer = http.post(`${__ENV.MANTA_HTTP}/chat/completions`, asked({}), json);
  took("an HTTP answer is whole", answer.status === 200 && answer.json("usage.completion_tokens") === TOKENS && answer.json("choices.0.finish_reason") === "length");
}

function connect() {
  if (!connected) client.connect(__ENV.MANTA_GRPC, { plaintext: true, reflect: true, timeout: "60s" });
  connected = true;
}

const request = () => ({
  model: MODEL, messages: [{ role: "ROLE_USER", content: `Count from ${__ITER} upwards.` }], options: { maxTokens: TOKENS, ignoreEos: true, seed: __ITER },
});

export function grpcWhole() {
  connect();
  const answer = client.invoke("manta.v1.MantaService/Chat", request(), { timeout: "120s" });
  took("a gRPC answer is whole", answer.status === grpc.StatusOK && answer.message.usage.completionTokens === TOKENS);
}

export function grpcStream() {
  connect();
  const stream = new grpc.Stream(client, "manta.v1.MantaService/ChatStream", { timeout: "120s" });
  let tokens = 0, finishes = 0, usage = null;
  stream.on("data", (event) => {
    if (event.delta) tokens += (event.delta.tokenIds || []).length;
    if (event.finish) finishes += 1;
    if (event.usage) usage = event.usage.completionTokens;
  });
  stream.on("error", (error) => console.error(JSON.stringify(error)));
  stream.on("end", () => took("a gRPC stream is whole", finishes === 1 && usage === TOKENS && tokens === TOKENS));
  stream.write({ request: request() });
  stream.end();
}

export function handleSummary(data) {
  const count = (name) => (data.metrics[name] ? data.metrics[name].values.count : 0);
  const spread = (name) => (data.metrics[name] ? data.metrics[name].values : null);
  const failed = data.metrics.http_req_failed.values.rate;
  return { stdout: JSON.stringify({ whole: count("whole"), refused: count("refused"), failed, http_ms: spread("http_req_duration"), grpc_ms: spread("grpc_req_duration") }) + "\n" };
}
