"use strict";
// Search, choice and order of the cases. Texts are read from the page and never made into HTML.
for (const box of document.querySelectorAll(".items")) {
  const list = box.querySelector(".list");
  const form = box.querySelector(".controls");
  const [find, status, sort, turn, told] = [".find input", ".status", ".sort", ".turn", "output"].map((name) => form.querySelector(name));
  const cases = [...list.children].map((element, place) => ({
    element, place, text: "", status: element.dataset.status, rank: element.dataset.rank, numbers: element.dataset.sort.split(","),
  }));
  const number = (text) => (text === "" || text === undefined ? null : Number(text));

  const choose = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const one of cases) {
      one.text ||= one.element.textContent.toLowerCase().replace(/\s+/g, " ");
      const fits = (!status || !status.value || one.status === status.value) && words.every((word) => one.text.includes(word));
      one.element.hidden = !fits;
      shown += fits;
    }
    const noun = shown === 1 ? box.dataset.one : box.dataset.several;
    told.textContent = shown === cases.length ? `${shown.toLocaleString("en")} ${noun}` : `${shown.toLocaleString("en")} of ${cases.length.toLocaleString("en")}`;
  };

  const order = () => {
    const key = sort.value;
    const value = (one) => (key === "" ? one.place : number(key === "rank" ? one.rank : one.numbers[Number(key)]));
    const sign = turn.checked ? -1 : 1;
    const sorted = [...cases].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place; // what has no number comes last
      return sign * (x - y) || a.place - b.place;
    });
    list.append(...sorted.map((one) => one.element));
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  find.addEventListener("input", choose);
  status?.addEventListener("change", choose);
  sort.addEventListener("change", order);
  turn.addEventListener("change", order);
  form.hidden = false;
  choose();
}
