"use strict";
(() => {
  const list = document.getElementById("cards");
  const cards = Array.from(list.children);
  const buttons = Array.from(document.querySelectorAll("button[data-show]"));
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const orders = {
    order: (a, b) => a.dataset.order - b.dataset.order,
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
    low: (a, b) => a.dataset.score - b.dataset.score,
    high: (a, b) => b.dataset.score - a.dataset.score,
  };
  let show = "all";

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let visible = 0;
    for (const card of cards) {
      const text = card.dataset.find.toLowerCase();
      const fits = (show === "all" || card.dataset.verdict === show) && words.every((word) => text.includes(word));
      card.hidden = !fits;
      visible += fits;
    }
    document.getElementById("count").textContent =
      visible === cards.length ? `${visible} videos` : `${visible} of ${cards.length} videos`;
    document.getElementById("none").hidden = visible > 0;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.show === show));
    // the URL holds the view, so that it survives a reload and can be shared
    const state = new URLSearchParams();
    if (show !== "all") state.set("show", show);
    if (sort.value !== "order") state.set("sort", sort.value);
    if (search.value) state.set("find", search.value);
    if (String(state) || !location.hash.startsWith("#v-")) history.replaceState(null, "", "#" + state);
  }

  function arrange() {
    cards.sort((a, b) => orders[sort.value](a, b) || orders.order(a, b));
    list.append(...cards);
    update();
  }

  const state = new URLSearchParams(location.hash.slice(1));
  if (buttons.some((button) => button.dataset.show === state.get("show"))) show = state.get("show");
  if (Object.hasOwn(orders, state.get("sort") || "")) sort.value = state.get("sort");
  search.value = state.get("find") || "";
  for (const button of buttons) {
    button.addEventListener("click", () => {
      show = button.dataset.show;
      update();
    });
  }
  search.addEventListener("input", update);
  sort.addEventListener("change", arrange);
  arrange();

  addEventListener("load", () => {
    const images = Array.from(document.images);
    const broken = images.filter((image) => image.naturalWidth === 0);
    for (const image of broken) image.classList.add("absent");
    document.documentElement.dataset.pictures = `${images.length - broken.length}/${images.length}`;
  });
})();
