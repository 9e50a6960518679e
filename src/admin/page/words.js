// Numbers as people read them. What is not known is a dash.

const DASH = "–";
const isUnknown = (value) => value === null || value === undefined || Number.isNaN(value);

export function count(value) {
  if (isUnknown(value)) return DASH;
  return value < 10_000 ? String(Math.round(value)) : new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
}

export function perSecond(value) {
  if (isUnknown(value)) return DASH;
  if (value === 0) return "0";
  return value < 10 ? value.toFixed(1) : count(value);
}

export function share(value) {
  return isUnknown(value) ? DASH : `${(value * 100).toFixed(1)} %`;
}

export function bytes(value) {
  if (isUnknown(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const unit = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, value)) / 10));
  const scaled = value / 1024 ** unit;
  return `${scaled < 10 && unit > 0 ? scaled.toFixed(1) : Math.round(scaled)} ${units[unit]}`;
}

/** Of seconds; two units at most. */
export function duration(seconds) {
  if (isUnknown(seconds)) return DASH;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => seconds >= size);
  if (first === -1) return "0 s";
  const [name, size] = units[first];
  const whole = Math.floor(seconds / size);
  const next = units[first + 1];
  const rest = next ? Math.floor((seconds - whole * size) / next[1]) : 0;
  return rest ? `${whole} ${name} ${rest} ${next[0]}` : `${whole} ${name}`;
}

/** Of milliseconds, short. */
export function ago(ms) {
  if (isUnknown(ms)) return DASH;
  return ms < 1000 ? `${Math.round(ms)} ms` : duration(ms / 1000);
}

/** Of microseconds. */
export function micros(value) {
  if (isUnknown(value)) return DASH;
  return value < 1000 ? `${Math.round(value)} µs` : `${(value / 1000).toFixed(value < 10_000 ? 1 : 0)} ms`;
}
