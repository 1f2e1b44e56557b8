/** The current settings as commands that run as they stand. No DOM here. */

import { requestBody } from "./settings.js";

const TOKEN = "DIFFUSION_BLEND_TOKEN";

/** A shell command that writes image.png. */
export function asCurl(settings, root, { token }) {
  const body = JSON.stringify(requestBody(settings), null, 2).replaceAll("'", "'\\''");
  const secret = token ? ` \\\n  -H "Authorization: Bearer $${TOKEN}"` : "";
  return [
    `curl -sS --fail-with-body '${root}/v1/images/generations' \\`,
    `  -H 'Content-Type: application/json'${secret} \\`,
    `  -d '${body}' \\`,
    "  | python3 -c 'import base64, json, sys",
    'png = base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"])',
    `open("image.png", "wb").write(png)'`,
    "",
  ].join("\n");
}

/** A Python script over the openai client that writes image.png. */
export function asPython(settings, root, { token, model }) {
  const { prompt, ...extra } = requestBody(settings);
  const fields = Object.entries(extra).map(([name, value]) => `        ${JSON.stringify(name)}: ${literal(value)},`);
  return [
    "import base64",
    ...(token ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${root}/v1`)}, api_key=${token ? `os.environ["${TOKEN}"]` : '"none"'})`,
    "answer = client.images.generate(",
    `    model=${JSON.stringify(model)},`,
    `    prompt=${JSON.stringify(prompt)},`,
    "    extra_body={",
    ...fields,
    "    },",
    ")",
    'Path("image.png").write_bytes(base64.b64decode(answer.data[0].b64_json))',
    "",
  ].join("\n");
}

/** JSON numbers, strings and objects are Python as they are; only the spacing follows its habits. */
function literal(value) {
  if (typeof value !== "object") return JSON.stringify(value);
  const parts = Object.entries(value).map(([name, part]) => `${JSON.stringify(name)}: ${JSON.stringify(part)}`);
  return `{${parts.join(", ")}}`;
}
