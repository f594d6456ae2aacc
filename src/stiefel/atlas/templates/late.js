(function () {
  "use strict";
  var root = document.documentElement;
  var all = function (query) { return Array.from(document.querySelectorAll(query)); };
  var byId = function (id) { return document.getElementById(id); };

  var dark = function () {
    return root.dataset.theme ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  all(".theme").forEach(function (button) {
    var label = function () { button.textContent = dark() ? "Light" : "Dark"; };
    button.hidden = false;
    label();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
    button.addEventListener("click", function () {
      root.dataset.theme = dark() ? "light" : "dark";
      label();
      try { localStorage.setItem("stiefel-theme", root.dataset.theme); } catch (error) { return; }
    });
  });

  // Without a clipboard (plain http) the text is selected, for the reader's own Ctrl+C.
  var copy = function (code) {
    if (navigator.clipboard) return navigator.clipboard.writeText(code.textContent);
    getSelection().selectAllChildren(code);
    return Promise.reject(new Error("no clipboard"));
  };
  all(".copy").forEach(function (button) {
    button.hidden = false;
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", function () {
      copy(button.parentElement.querySelector("code")).then(
        function () { button.textContent = "Copied"; },
        function () { button.textContent = navigator.clipboard ? "Not allowed" : "Selected"; }
      ).then(function () { setTimeout(function () { button.textContent = "Copy"; }, 1500); });
    });
  });

  var tools = document.querySelector(".tools");
  if (!tools) return;
  var cards = all(".card"), topics = all(".topic"), flat = byId("flat"), search = byId("search");
  var fields = { q: search, topic: byId("topic"), verdict: byId("verdict"), data: byId("data"), sort: byId("sort") };
  var homes = cards.map(function (card) { return card.parentElement; });
  var number = function (card, name) { var text = card.dataset[name]; return text ? Number(text) : NaN; };
  // What has no such number comes last; equals stay in the order of the page.
  var order = function (name, sign) {
    return function (a, b) {
      var x = number(a, name), y = number(b, name);
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
      return x === y ? 0 : sign * (x < y ? -1 : 1);
    };
  };
  var orders = {
    date: function (a, b) { return a.dataset.date < b.dataset.date ? 1 : a.dataset.date > b.dataset.date ? -1 : 0; },
    margin: order("margin", -1),
    time: order("seconds", 1)
  };
  var placed = "";

  var place = function (sort) {
    if (sort === placed) return;
    placed = sort;
    if (sort) cards.slice().sort(orders[sort]).forEach(function (card) { flat.lastElementChild.append(card); });
    else cards.forEach(function (card, i) { homes[i].append(card); });
    flat.firstElementChild.textContent = sort ? fields.sort.selectedOptions[0].textContent : "";
  };
  var show = function () {
    var words = search.value.toLowerCase().split(/\s+/).filter(Boolean), shown = 0;
    place(fields.sort.value);
    cards.forEach(function (card) {
      var fits = (!fields.topic.value || card.dataset.topic === fields.topic.value)
        && (!fields.verdict.value || card.dataset.verdict === fields.verdict.value)
        && (!fields.data.value || card.dataset.kind === fields.data.value)
        && words.every(function (word) { return card.dataset.text.includes(word); });
      card.hidden = !fits;
      shown += fits;
    });
    topics.forEach(function (topic) { topic.hidden = !topic.querySelector(".card:not([hidden])"); });
    flat.hidden = !placed || !shown;
    all(".topics").forEach(function (nav) { nav.hidden = Boolean(placed) || shown < cards.length; });
    byId("shown").textContent = shown === cards.length ? "" : shown + " of " + cards.length + " papers";
    byId("clear").hidden = shown === cards.length && !placed;
    byId("none").hidden = shown > 0 || !cards.length;
  };

  // The state stands in the fragment, which works from a file as well as from a server.
  var keep = function () {
    var state = new URLSearchParams();
    Object.keys(fields).forEach(function (name) { if (fields[name].value) state.set(name, fields[name].value); });
    var text = state.toString();
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  };
  var recall = function () {
    var text = location.hash.slice(1);
    if (text && !text.includes("=")) {  // a place on the page
      var target = byId(text);
      if (target && target.hidden) { tools.reset(); show(); target.scrollIntoView(); }
      return;
    }
    var state = new URLSearchParams(text);
    Object.keys(fields).forEach(function (name) {
      var field = fields[name], value = state.get(name) || "";
      // A topic or verdict that is not there, of an old link, is none.
      field.value = field.options && !Array.from(field.options).some(function (o) { return o.value === value; }) ? "" : value;
    });
    show();
  };
  var clear = function () { tools.reset(); show(); keep(); };

  tools.addEventListener("input", function () { show(); keep(); });
  tools.addEventListener("submit", function (event) { event.preventDefault(); });
  byId("clear").addEventListener("click", function () { clear(); search.focus(); });
  addEventListener("hashchange", recall);

  // Arrow keys go from card to card: left and right in order, up and down by place.
  var links = function () {
    return all(".card h3 a").filter(function (link) { return !link.closest("[hidden]"); });
  };
  var beside = function (link, key) {
    var every = links(), at = every.indexOf(link), from = link.closest(".card").getBoundingClientRect();
    if (key === "ArrowRight") return every[at + 1];
    if (key === "ArrowLeft") return every[at - 1];
    var best, least = Infinity, sign = key === "ArrowDown" ? 1 : -1;
    every.forEach(function (other) {
      var box = other.closest(".card").getBoundingClientRect(), down = sign * (box.top - from.top);
      var far = down + 4 * Math.abs(box.left - from.left);
      if (down > 1 && far < least) { least = far; best = other; }
    });
    return best;
  };
  document.addEventListener("keydown", function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    var target = event.target, typing = target.matches("input, select, textarea");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (event.key === "Escape" && (!typing || target === search)) {
      if (search.value || !typing) clear(); else search.blur();
    } else if (event.key === "ArrowDown" && target === search && links().length) {
      event.preventDefault();
      links()[0].focus();
    } else if (/^Arrow/.test(event.key) && target.matches(".card h3 a")) {
      event.preventDefault();
      var next = beside(target, event.key);
      if (next) next.focus(); else if (event.key === "ArrowUp") search.focus();
    }
  });
  recall();
})();
