// Ages are counted on; the page is fetched again while it is in sight, and replaced where it is:
// no jump, and what was unfolded stays so.
const began = Date.now() / 1000 - Number(document.body.dataset.now);
let tag = null;
function words(s) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (s >= 2 * length) return (s / length).toFixed(s < 10 * length ? 1 : 0) + " " + unit;
  return Math.max(0, Math.round(s)) + " s";
}
function count() {
  for (const t of document.querySelectorAll("time"))
    t.textContent = words(Date.now() / 1000 - began - Number(t.dataset.at)) + " ago";
}
async function renew() {
  if (document.hidden) return;
  try {
    const headers = tag ? {"If-None-Match": tag} : {};
    const reply = await fetch(location.pathname, {headers, cache: "no-store"});
    document.body.classList.remove("lost");
    if (reply.status != 200) return;
    tag = reply.headers.get("ETag");
    const page = new DOMParser().parseFromString(await reply.text(), "text/html");
    const open = new Set([...document.querySelectorAll("details[open]")].map(d => d.id));
    for (const d of page.querySelectorAll("details")) d.open = open.has(d.id);
    document.querySelector("main").replaceWith(page.querySelector("main"));
    document.title = page.title;
    count();
  } catch { document.body.classList.add("lost"); }
}
setInterval(count, 1000);
setInterval(renew, Number(document.body.dataset.every) * 1000);
document.addEventListener("visibilitychange", renew);
count();
