/** What an answer cost, alone or beside the dense one. */

import { make } from "./dom.js";
import { bytes, count, percent, seconds } from "./words.js";

/** The figures of one answer. */
export function figures(report) {
  const { total, dense } = report.bytes_per_token;
  const list = make("dl", "figures");
  list.append(
    figure(bytes(total), "read per token", `${percent(total / dense)} of ${bytes(dense)}`, total / dense),
    figure(percent(report.budget_spent), "of the keys read", `${percent(report.budget)} asked for`),
    figure(seconds(report.seconds.per_token), "per token", `${seconds(report.seconds.first_token)} to the first`),
  );
  return list;
}

/** Both answers side by side; `same` of `all` words of the dense one are in the other. */
export function comparison(report, dense, same, all) {
  const table = make("table", "comparison");
  table.append(make("caption", "unseen", "The answer and the dense answer compared"));
  const head = table.createTHead().insertRow();
  head.append(make("td"), headed("col", percent(report.budget)), headed("col", "dense"), headed("col", "ratio"));
  const body = table.createTBody();
  const rows = [
    ["read per token", report.bytes_per_token.total, dense.bytes_per_token.total, bytes],
    ["first token", report.seconds.first_token, dense.seconds.first_token, seconds],
    ["each further token", report.seconds.per_token, dense.seconds.per_token, seconds],
  ];
  for (const [name, ours, theirs, shown] of rows) {
    const row = body.insertRow();
    row.append(headed("row", name), make("td", "", shown(ours)), make("td", "", shown(theirs)), make("td", "", ratio(theirs, ours)));
  }
  const row = body.insertRow();
  const words = make("td", "", same === all ? `all ${count(all)} alike` : `${count(same)} of ${count(all)} alike`);
  words.colSpan = 3;
  row.append(headed("row", "words"), words);
  return table;
}

function figure(value, what, more, share) {
  const group = make("div");
  group.append(make("dt", "", what), make("dd", "value", value), make("dd", "hint", more));
  if (share === undefined) return group;
  const bar = make("dd", "bar");
  const part = make("span");
  bar.setAttribute("aria-hidden", "true");
  part.style.width = `${100 * Math.min(1, share)}%`;
  bar.append(part);
  group.append(bar);
  return group;
}

function headed(scope, text) {
  const cell = make("th", "", text);
  cell.scope = scope;
  return cell;
}

function ratio(theirs, ours) {
  return ours > 0 && theirs > 0 ? `${(theirs / ours).toFixed(1)} ×` : "";
}
