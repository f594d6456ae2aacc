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
    button.addEventListener("click", function () {
      root.dataset.theme = dark() ? "light" : "dark";
      label();
      try { localStorage.setItem("stiefel-theme", root.dataset.theme); } catch (error) { return; }
    });
  });

  all(".copy").forEach(function (button) {
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", function () {
      var text = button.parentElement.querySelector("code").textContent;
      navigator.clipboard.writeText(text).then(
        function () { button.textContent = "Copied"; },
        function () { button.textContent = "Not allowed"; }
      ).then(function () { setTimeout(function () { button.textContent = "Copy"; }, 1500); });
    });
  });

  var tools = document.querySelector(".tools");
  if (!tools) return;
  var cards = all(".card");
  var filter = function () {
    var words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    var topic = byId("topic").value, verdict = byId("verdict").value, shown = 0;
    cards.forEach(function (card) {
      var fits = (!topic || card.dataset.topic === topic)
        && (!verdict || card.dataset.verdict === verdict)
        && words.every(function (word) { return card.dataset.text.includes(word); });
      card.hidden = !fits;
      shown += fits;
    });
    byId("shown").textContent = shown === cards.length ? "" : shown + " of " + cards.length + " shown";
    byId("none").hidden = shown > 0 || !cards.length;
  };
  tools.hidden = false;
  tools.addEventListener("input", filter);
  tools.addEventListener("submit", function (event) { event.preventDefault(); });
  byId("reset").addEventListener("click", function () { tools.reset(); filter(); });
  filter();
})();
