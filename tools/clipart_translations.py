"""English names for the clip art that is named in other languages, or in abbreviations.

About 500 of the Open Clip Art drawings used here carry Italian, French, Spanish or Portuguese
titles, and the icon themes are named after KDE actions with the words run together. The tables
below were written by hand, looking at the pictures. The key is what `clipart_captions.plain_name`
makes of a title or a file name, case-folded.
"""


def _table(text: str) -> dict[str, str]:
    """Read `name = English` pairs, separated by semicolons or line ends."""
    pairs = (pair.split("=") for pair in text.replace("\n", ";").split(";") if pair.strip())
    return {name.strip().casefold(): english.strip() for name, english in pairs}


TITLES = _table("""
abitazione villa con giardino = villa with garden; acquila = eagle; aglio = garlic; al bar = at the bar; albero = tree
analisi del sangue = blood test; anelli = rings; antilope = antelope; appunti = notes
aquila frontale = eagle from the front; architetto = architect; asso carte = ace playing card
attenzione = attention sign; attenzione rotondo = round attention sign; ballerina = ballerina
barattolo di pillole = jar of pills; bicicletta cycle = bicycle; binocolo bn = black and white binoculars; bobi = dog
borsa estiva = summer bag; bottiglia di vino pregiato = bottle of fine wine
bussiness woman donna in carriera = businesswoman; bussola = compass; calamita = magnet; calcolatrice = calculator
camicia in seta = silk shirt; canguro = kangaroo; cani e gatti , cat and dog = cat and dog
capitello modanatura modanature moulure moulures = capital and mouldings of a column; carta = sheet of paper
cartella dossier directory = folder; casa dei sogni = dream house; casa in campagna = country house
casa plurifamigliare = apartment house; casa verde = green house; casco con microfono = helmet with microphone
cassa d'epoca = antique chest; cassa negozio = cash register; cassette video = video cassette
cavalletta = grasshopper; cavallo = horse; cestino pieno = full wastebasket; cestino vuoto = empty wastebasket
cesto = basket; chalet di montagna = mountain chalet; chiave = key; cigni bianchi e neri = white and black swans
cigno = swan; cigno di notte nella palude = swan at night in the marsh; cigno di spalle = swan from behind
cinepresa = movie camera; clessidra = hourglass; clips = paper clips; coccinella = ladybug; coccinellona = big ladybug
come si dispongono le posate = how to lay the cutlery; coniglio = rabbit; cubo rosso = red cube
cubo giallo = yellow cube; cubo verde = green cube; decorazione = decoration
demolizione costruzione = demolition and construction; dente = tooth; diagramma = diagram; dino = dinosaur
dinosauri = dinosaurs; dinosauro = dinosaur; donna incinta = pregnant woman; dossier = folder; elefante = elephant
esperimento chimico = chemistry experiment; farfalla - butterfly = butterfly
farfalla contorno = outline of a butterfly; farfalla semplice = simple butterfly
farfalla stilizzata = stylized butterfly; fata fatina = fairy; ferro da stiro = clothes iron; finestra = window
finestra estendi = extend window; finestra hz = horizontal windows; finestra ridimensiona = resize window
finestre sovrapposte = overlapping windows; finestre vt = vertical windows; foglio e mondo = sheet of paper and globe
forbici e pettine - scissors and comb = scissors and comb; forchettoni da grigliata = barbecue forks
formichina = little ant; formicona = big ant; formulario = form; fuoco da campeggio = campfire; gabbiano = seagull
gallo di profilo = rooster in profile; gattina cat = kitten; gatto cat = cat; gatto nero = black cat
gelato all'italiana = Italian ice cream; griglia = grid; gufo civetta = owl
human, humain, umano seduto = sitting human; istogramma = bar chart; la prugna = plum
lampada di aladino (aladin) = Aladdin's lamp; lana = wool; lattine di birra = beer cans
le mie tigri preferite = my favourite tigers; lens, lente = magnifying lens
lente meno = magnifying glass with minus sign; lente normale = magnifying glass; leone = lion
liberty = art nouveau decoration; libro di ricette di cucina italiana (w italia) = Italian cookery book
livella = spirit level; lucchetto grigio = grey padlock; lucchetto ottone = brass padlock; lucertola = lizard
lucertola arrotolata = curled lizard; lucertola maya = Mayan lizard; lucertolona = big lizard
lucertolone = big lizard; lumaca = snail; lumaca turbo = turbo snail; macchina caffe = coffee machine
macchina fotografica digitale = digital camera; mantide religiosa = praying mantis; marchio gallina = hen emblem
mazzo di fiori = bunch of flowers; medicina dottore = medicine, doctor; microscopio = microscope
mix cucina, frullatore = kitchen mixer; mondo = globe; moschito = mosquito; moschito stecchito = dead mosquito
mostriciattolo = little monster; motivo geometrico = geometric motif
noi due insieme (brindisi calici) = two glasses in a toast; nonno sport = sporty grandfather
nucleare simbolo = nuclear symbol; ontologia del vino = ontology of wine; orme sulla neve = footprints in the snow
tante orme sulla neve = many footprints in the snow; orologio da parete = wall clock; orso = bear
pacco regalo = gift package; pace e bene! = peace and goodness; paesaggio marino = seascape
pallone aerestatico = hot air balloon; pannocchia di gran turco = corn cob; pattinatrice = figure skater
pattinatrici sul ghiaccio = ice skaters; pattino = ice skate; pecora = sheep; pera = pear; pesca = peach
pescetto arancione = little orange fish; pinguino col piccolo = penguin with its chick; pinzatrice = stapler
pizza 4 stagioni = four seasons pizza; pollo = chicken; poltrona ufficio = office armchair; pomodori = tomatoes
portafoglio = wallet; profilati profilato ipe ipn acciaio = steel beams; proiettore = projector
provetta plasma sangue = test tube of blood plasma; provetta = test tube; provette = test tubes
pulsante = push button; puntine = thumbtacks; quattro farfalle = four butterflies
ragnetto incazzato = angry little spider; ragno figo = cool spider; ramarro = green lizard; rana = frog
ravanello = radish; rilievo = relief; ruota dentata = cogwheel; ruota dentata grigia = grey cogwheel
sacco a pelo per campeggio = sleeping bag for camping; salvagente = life belt; sapone liquido = liquid soap
schermo macintosh = Macintosh screen; scissors - forbici = scissors; scodella gatto = cat bowl
scolapasta e pentola = colander and pot; scotch = roll of sticky tape; secchio e spugna = bucket and sponge
sedia e ombrelloni = deck chair and beach umbrellas; sedia in legno = wooden chair; signore = gentleman
signorina = young lady; simbolo egizio = Egyptian symbol; simbolo emergenza sanitaria = medical emergency symbol
simbolo giapponese = Japanese symbol; stambecco valdostano = ibex of the Aosta Valley; stampante = printer
stormo di uccelli = flock of birds; sub subacqueo = scuba diver
stemma comune saint vincent valle d'aosta = coat of arms of Saint Vincent, Aosta Valley; tabella = table of data
tacchino = turkey; tasto = key button; tatoo tatuaggio tatuaggi = tattoo; tavolo in legno = wooden table
tavolozza = painter's palette; tazza di caffe = cup of coffee; teiera tazza = teapot and cup
telecamera = video camera; telefono = telephone; televisore telecomando = television and remote control
tenda da campeggio = camping tent; tigre = tiger; topo = mouse; toro al tramonto = bull at sunset; torta = cake
trattore = tractor; uccello bianco e nero = black and white bird; uccello profilo = bird in profile
unita disco rigido = hard disk drive; utensile sega = saw; utensili chiave e cacciavite = wrench and screwdriver
utente singolo = single user; utenti = users; vacca pezzata rossa valdostana = red pied cow of the Aosta Valley
valigie bags = suitcases; viti = screws; zanzara = mosquito; zanzara cretina = silly mosquito; zucca = pumpkin
fabbrica = factory; insetto = insect; io bambina = girl; lettera = letter; io donna uomo = woman and man
libellula = dragonfly; mattone poroton = clay brick; palloncini = balloons; peperoncino - pepper = hot pepper
siringa = syringe; pantyhose collant = pantyhose; anatra = duck
attaccapanni con vestito da donna = woman's dress on a hanger; colombo = Christopher Columbus
condominio = apartment block; cornetto = croissant; martellare = hammering worker; montacarichi = forklift truck
pinguino = penguin; pittura con pennello = painting with a brush; simbol medicina = medical symbol
tacchino di natale = Christmas turkey; traslocatore = furniture mover; uovo sorridente = smiling egg
ambulanza = ambulance; ape miele = honey bee; asse da stiro = ironing board; azienda vendite = company sales
betoniera = concrete mixer; biberon = baby bottle; blocco ghiaccio = block of ice; blocco notes = notepad
borsetta = handbag; calzettoni = long socks; cammello = camel; candela = candle; carpentiere = carpenter
carretta da cantiere = wheelbarrow; ciuccio = pacifier; corridore = runner; donna casinista = messy woman
elefante in corsa = running elephant; elefantone = big elephant; fattoria = farm; festoni = festoons; fiocco = bow
foglie arancioni = orange leaves; foglie marroni = brown leaves; foglie rosse = red leaves
foglie verdi = green leaves; gabbiano piccolo = small seagull; ghirlande festa = party garlands
giardinaggio = gardening; grattacieli grigi = grey skyscrapers; grondaia = gutter; guanti e pinze = gloves and pliers
imbianchino in piedi = standing house painter; lampada da cantiere = work lamp; metro avvolgibile = tape measure
motosega = chainsaw; mucca = cow; papera = duck; pecorella = little sheep; pennuto = feathered bird
pescetto = little fish; pesistica = weightlifting; pinzatrice grigia = grey stapler; principessa = princess
principessa bn = princess, black and white; profilo della citta = city skyline; ragazza bionda = blonde girl
ragazza bruna = brunette girl; ragazza rossa = red-haired girl; ragazza seduta = sitting girl; ragazzo = boy
rosa = rose; scala doppia = stepladder; scatolone = cardboard box; sega per legno = wood saw; serratura = lock
set gatti = set of cats; signorina in viola = young lady in purple; signorinacappello = young lady with a hat
signorinafoulard = young lady with a scarf; silouettedonnavestiti = silhouettes of dressed women
simbol donna = symbol of a woman; spaventapasseri = scarecrow; stetoscopio fonendoscopio = stethoscope
striscia agnellini = row of lambs; striscia mucche = row of cows; struzzo = ostrich
tavola esame ottico = eye test chart; texturelegno = wood texture; tramezzino = sandwich
trekking in montagna = mountain hiking; vestito rosa = pink dress; zaino per montagna = mountain backpack
paper rpswb = paper hand sign; rock rpswb = rock hand sign; scissors rpswb = scissors hand sign
sport aerobica = aerobics; sport stacco = deadlift; sport harnsasana = Hamsasana yoga pose
sport khagarnasana = Khagasana yoga pose; sport kzounchasana = Krounchasana yoga pose
sport mayuzasana = Mayurasana yoga pose; sport parsva bakasana = Parsva Bakasana yoga pose
sport garudasana = Garudasana yoga pose; sport paksinasana = Paksinasana yoga pose
champ magnetique important = warning sign: strong magnetic field; bande marquage securite = safety marking stripes
basse temperature = warning sign: low temperature; charges suspendues = warning sign: suspended loads
chute denivellation = warning sign: drop; danger electrique = warning sign: electricity
danger general = warning sign: general danger; matieres comburantes = warning sign: oxidizing materials
matieres corrosives = warning sign: corrosive materials; matieres explosives = warning sign: explosive materials
matieres inflammables = warning sign: flammable materials
matieres nocives irritantes = warning sign: harmful or irritant materials
matieres toxiques = warning sign: toxic materials; radiations ionisantes = warning sign: ionizing radiation
radiations non ionisantes = warning sign: non-ionizing radiation; rayonnement laser = warning sign: laser beam
risque biologique = warning sign: biological hazard; trebuchement = warning sign: tripping
vehicules manutention = warning sign: forklift trucks; comburant = oxidizing hazard symbol
corrosif = corrosive hazard symbol; explosif = explosive hazard symbol; toxique = toxic hazard symbol
nocif = harmful hazard symbol; danger général = general danger sign; danger électrique = electric danger sign
defense de fumer = no smoking sign; defense eteindre avec eau = do not extinguish with water sign
direction a suivre = direction to follow arrow sign; direction à suivre = direction to follow arrow sign
douche securite = safety shower sign; eau non potable = water not drinkable sign; echelle = fire ladder sign
entree interdite = no entry sign; extincteur = fire extinguisher sign
extremement inflammable = extremely flammable hazard symbol; civiere = stretcher sign
facilement inflammable = highly flammable hazard symbol; charge lourde = heavy load sign
flamme nue interdite = no open flame sign; interdiction pietons = no pedestrians sign
interdiction vehicules manutention = no forklift trucks sign; lance a incendie = fire hose sign
chaussee glissante = slippery road sign; chaussée particulièrementglissante = slippery road sign
irritant = irritant hazard symbol; protection obligatoire contre les chutes = fall protection required sign
protection obligatoire de la figure = face protection required sign
protection obligatoire de la tete = head protection required sign
protection obligatoire de la vue = eye protection required sign
protection obligatoire des mains = hand protection required sign
protection obligatoire des pieds = foot protection required sign
protection obligatoire des voies respiratoires = respiratory protection required sign
protection obligatoire du corps = body protection required sign
protection obligatoire ouie = hearing protection required sign; obligation generale = general mandatory sign
pietons obligatoire = pedestrians only sign; premiers secours = first aid sign
sortie de secours = emergency exit sign; telephone incendie = fire telephone sign; nuage = cloud; lizard = lizard
lézard = lizard; aviso = warning sign; disquete = floppy disk; pastas = folders; engrenagem = gear
preenchimento inkscape = fill dialog of Inkscape; alerta for manuals = alert sign for manuals; glace = ice cream
glace black and white = ice cream, black and white; glace italienne = soft ice cream cone; gateau = cake
glace italienne black and white = soft ice cream cone, black and white; rondelle d'orange = slice of orange
rondelle orange = slice of orange; toque = chef's hat; flamand = flamingo
flamand black and white = flamingo, black and white; arbre modern = modern tree
arbre modern black and white = modern tree, black and white; olivier one = olive tree
olivier one black and white = olive tree, black and white; as carreau = ace of diamonds; as coeur = ace of hearts
as pique = ace of spades; as trefle = ace of clubs; double croche = sixteenth note; simple croche = eighth note
double note = two beamed notes; double note two = two beamed sixteenth notes; pansement = adhesive bandage
ours = bear; bofish = fish from the front; sole = sun; francobollo gnome = GNOME postage stamp; cartes = playing cards
bobine = film reel; bitte keine tueten rauchen! = please do not smoke sign; amibe = amoeba
grune punkt = green dot recycling symbol; ambulans = ambulance; estrella = star; recznik - wiper = towel
teschio = skull; toros = bulls; chodovian's dog by mikolá ale = dog; numero verde = toll-free number sign
forbici = scissors; mpcad box = unfolded box; cigni = swans; mosquito = mosquito; chomper = chomping creature
jin-jang = yin and yang symbol; yang = yin and yang symbol; icthus = Christian fish symbol; fc = flowchart
h foot print = human footprint; lam = letter; manuscriot = manuscript; mygraph = graph; cacuts = cactus
packman = Pac-Man; pregnancy silhouet = silhouette of a pregnant woman; volleball net = volleyball net
plane silhouet = silhouette of an airplane; skoda car = Skoda car; gauffre au chocolat = chocolate waffle
pasteque = watermelon; sapin = fir tree; couronne = crown; abeille = bee; coccinelle = ladybug; libellule = dragonfly
mante religieuse = praying mantis; punaisa = stink bug; porcinet = piglet; kubek herbaty - mug of tea = mug of tea
pudim = pudding; carte de france = map of France; zielony kubek herbaty - green mug of tea = green mug of tea
rios de españa = rivers of Spain; calebasse = calabash gourd; mapa stawisk = map of Stawiski
diamante illuminati = illuminati diamond; mhooo! = cartoon cow; shaezy = cartoon sheep; skoynk = cartoon rabbit
squeek! = cartoon pig; mulit colour fireworks = multi colour fireworks; champignon = mushroom
balearian islands = Balearic Islands; canarian islands = Canary Islands
celticknotwork trianglesimple = simple triangle of Celtic knotwork; magnifing glass = magnifying glass
vavuum cleaner - upright = upright vacuum cleaner; spaclu = spatula; derbouk = darbuka drum
tree whit fruits = tree with fruits; network could = network cloud; bibliografia = bibliography
stara ksiega - old book = old book; colori = colours; pennello = paint brush; fiore = flower; reunion = meeting
x simbol = X symbol; diamante = diamond; envelop = envelope; hide girl = hiding girl
radiations nonionisantes = warning sign: non-ionizing radiation; ne pas toucher = do not touch sign
protection obligatoire corps = body protection required sign
protection obligatoire figure = face protection required sign
protection obligatoire mains = hand protection required sign
protection obligatoire pieds = foot protection required sign; protection obligatoire pietons = pedestrians only sign
protection obligatoire tete = head protection required sign; protection obligatoire vue = eye protection required sign
protection obligatoire voies respiratoires = respiratory protection required sign
sortie issue de secours = emergency exit sign; tres toxique = very toxic hazard symbol; rincage yeux = eye wash sign
risque pour l'environnement = environmental hazard symbol; passo carrabile = driveway, no parking sign
telephone sauvetage = rescue telephone sign; telephone lutte incendie = fire telephone sign
ex = explosive atmosphere sign
stemma comune saint vincent valle d'aosta ( ) = coat of arms of Saint Vincent, Aosta Valley
moonphases openclipart = moon phases; nomoon openclipart = new moon; waxingcrescent openclipart = waxing crescent moon
firstquarter openclipart = first quarter moon; waxinggibbous openclipart = waxing gibbous moon
fullmoon openclipart = full moon; waninggibbous openclipart = waning gibbous moon
lastquarter openclipart = last quarter moon; waningcrescent openclipart = waning crescent moon
southen cross = Southern Cross; southen cross black = Southern Cross, black; cdfrontcover openclipart = CD front cover
cdlabel openclipart = CD label; books-aj.svg = books; help-books-aj.svg = help books; large braces.svg = large braces
funnyflower = funny flower; flower and pot = flower in a pot; bypasspruner = bypass pruner; bowsaw = bow saw
floppydisk = floppy disk; handwithstar = hand with star; lotas = lotus; blokken = blocks; info = information
cymru flag (wales) = flag of Wales; gwen ha du = flag of Brittany; architettura = architecture
capitello = capital of a column
""")
"""Titles and file names in other languages (or misspelt) -> what the picture shows."""

ICONS = _table("""
abs = absolute value; addquestion = add question; adjustcol = adjust column width; adjustrow = adjust row height
align objs = align objects; aobottom = align objects bottom; aocenterh = align objects at horizontal centre
aocenterv = align objects at vertical centre; aoleft = align objects left; aoright = align objects right
aotop = align objects top; ark adddir = add folder to archive; ark addfile = add file to archive
ark delete = delete from archive; ark extract = extract archive; ark help = archive help; ark new = new archive
ark open = open archive; ark options = archive options; ark selectall = select all in archive; ark view = view archive
arrowheads = arrow heads; artsaudiomanager = audio manager; artsbuilderexecute = execute sound builder
artsmediatypes = media types; artsmidimanager = MIDI manager; atlantik buy estate = buy estate
autodiff = automatic difference; autoform = automatic form; borderbottom = bottom border; borderleft = left border
borderright = right border; bordertop = top border; black sum = sum sign; catalogmanager = catalog manager
cdburn = burn CD; cdcopy = copy CD; cdinfo = CD information; centrejust = centre justified text
charset = character set; charselect = character selection; checkedbox = checked box; checkmark = check mark
colorpicker = colour picker; compfile = compare files; contexthelp = context help; cssvalidator = CSS validator
cubicbeziercurve = cubic Bezier curve; closed quadricbeziercurve = closed quadratic Bezier curve
closed freehand = closed freehand line; quadricbeziercurve = quadratic Bezier curve; deletecell = delete cell
delquestion = delete question; dirsynch = synchronize folders; dirsynch new = synchronize new folders
dissociatecell = split cell; documentinfo = document information; domtreeviewer = document tree viewer
editclear = clear; editcopy = copy; editcut = cut; editdelete = delete; editpaste = paste; editshred = shred
edittrash = trash; editquestion = edit question; emptybox = empty box; endturn = end turn; enumlist = numbered list
unsortedlist = bulleted list; enum list = numbered list; unsorted list = bulleted list; frac = fraction
funct = function; fileexport = export file; fileimport = import file; filequickprint = quick print file
filesave = save file; filesaveas = save file as; fileclose = close file; filefind = find file; filenew = new file
fileopen = open file; fileprint = print file; filterstop = stop filter; flightevaluation = flight evaluation
fontsizedown = decrease font size; fontsizeup = increase font size; format decreaseindent = decrease indent
format increaseindent = increase indent; frameprint = print frame; gg away = away status; gg ignore = ignored contact
gg invi = invisible status; gg offline = offline status; gg online = online status; goto = go to; gohome = go home
groupevent = group event; halfencrypted = half encrypted; highscore = high score; hilo = high and low
homepage = home page; htmlvalidator = HTML validator; imagegallery = image gallery; inscol = insert column
insrow = insert row; insertcell = insert cell; inserttable = insert table; insertknots = insert knots; int = integral
irc away = chat away; irc online = chat online; irc voice = chat voice; irkick = infrared remote control
irkickflash = infrared remote control flashing; irkickoff = infrared remote control off
jabber offline = Jabber chat offline; kaboodleloop = loop playback; juk dock = JuK music player; juk volume = volume
kr fullview = full view; kr terminal = terminal; kr unselectall = unselect all; krtreeview = tree view
largethumbnails = large thumbnails; medthumbnails = medium thumbnails; smallthumbnails = small thumbnails
laptop nobattery = laptop without battery; laptop nocharge = laptop not charging; leftjust = left justified text
rightjust = right justified text; locationbar erase = erase location bar; lsub = left subscript
lsup = left superscript; rsub = right subscript; rsup = right superscript; mail replyall = reply to all mail
mail replylist = reply to mailing list; mail generic = mail; mail get = get mail; mail new = new mail
mail find = find mail; mail post to = post mail to; make kdevelop = build; math onetwomatrix = one by two matrix
math paren = parentheses; math brace = curly braces; math brackets = square brackets; math frac = fraction
math int = integral; math lsub = left subscript; math lsup = left superscript; math rsub = right subscript
math rsup = right superscript; math prod = product sign; math sqrt = square root; math sum = sum sign
math abs = absolute value; paren = parentheses; mergecell = merge cells; messagebox critical = critical error message
messagebox info = information message; messagebox warning = warning message; miror = mirror; monop board = board game
multirow = multiple rows; multiline = several lines; music 32ndnote = thirty-second note; music cleficon = treble clef
music cross = double sharp; music dottednote = dotted note; music eightnote = eighth note; music fermatenote = fermata
music flat = flat sign; music fullnote = whole note; music halfnote = half note; music natur = natural sign
music quarternote = quarter note; music sixteenthnote = sixteenth note; neonpen = highlighter pen
netactivity full = full network activity; netactivity none = no network activity; netactivity rx = network receiving
netactivity tx = network transmitting; newfont = new font; newrecurevent = new recurring event; newtodo = new to-do
todo = to-do; nexterror = next error; nextfuzzy = next fuzzy translation
nextfuzzyuntrans = next fuzzy or untranslated text; nextmarked = next marked; nextpo = next translation file
nexttemplate = next template; nextuntranslated = next untranslated text; preverror = previous error
prevfuzzy = previous fuzzy translation; prevfuzzyuntrans = previous fuzzy or untranslated text
prevmarked = previous marked; prevpo = previous translation file; prevtemplate = previous template
prevuntranslated = previous untranslated text; nomailappt = no mail appointment; openftdown = OpenFT disconnected
openftup = OpenFT connected; openterm = open terminal; pen style dashdot = dash-dot line
pen style dashdotdot = dash-dot-dot line; pen style dash = dashed line; pen style dot = dotted line
pen style solid = solid line; pen style nopen = no line; pgnum = page number; player fwd = player fast forward
player rew = player rewind; playsound = play sound; precminus = less precision; precplus = more precision
previewprint = print preview; remcol = remove column; remrow = remove row; removecell = remove cell
removecomment = remove comment; resizecol = resize column; resizerow = resize row; rotate cw = rotate clockwise
roundcorners = round corners; roundrect = rounded rectangle; selectnodes = select nodes; sinus = sine wave
shadowb = shadow below; shadowl = shadow left; shadowr = shadow right; shadowu = shadow above
shadowlb = shadow left below; shadowlu = shadow left above; shadowrb = shadow right below; shadow b = shadow below
shadow l = shadow left; shadow r = shadow right; shadow u = shadow above; shadow lb = shadow left below
shadow lu = shadow left above; shadow rb = shadow right below; showmenu = show menu; smallcal = small calendar
sort incr = sort ascending; sort decrease = sort descending; sub = subscript; super = superscript
tab breakoff = detach tab; tea anim = steaming tea cup; tea not ready = tea cup not ready; timespan = time span
togglefuzzy = toggle fuzzy translation; unindent = decrease indent; viewmag = magnifying glass
viewmag enlarge = zoom in; viewmag shrink = zoom out; viewmag factor = zoom factor; viewmag h = zoom to height
viewmag w = zoom to width; viewmag lock = locked zoom; viewmagfit = zoom to fit; viewmag plus = zoom in
viewmag minus = zoom out; view sidetree = side tree view; view multicolumn = multi-column view
view top bottom = view split top and bottom; view left right = view split left and right; webarchiver = web archiver
webexport = web export; whatsnext = what is next agenda; window fullscreen = full screen window
window nofullscreen = leave full screen; xdays = several days; 1day = one day; 5days = five days; 7days = seven days
1downarrow = down arrow; 1leftarrow = left arrow; 1rightarrow = right arrow; 1uparrow = up arrow
2downarrow = double down arrow; 2leftarrow = double left arrow; 2rightarrow = double right arrow
2uparrow = double up arrow; 3downarrow = triple down arrow; 3leftarrow = triple left arrow
3rightarrow = triple right arrow; 3uparrow = triple up arrow; 1down = down; areas3d = three-dimensional area chart
areas = area chart; bars3d = three-dimensional bar chart; bars = bar chart; cakes3d = three-dimensional pie chart
cakes = pie chart; lines3d = three-dimensional line chart; kdat = tape backup; tux = Tux penguin; exec = execute
exec wine = Wine program; cdaudio mount = mounted audio CD; cdrom mount = mounted CD-ROM; cdrom unmount = CD-ROM drive
cdwriter mount = mounted CD writer; cdwriter unmount = CD writer; dvd mount = mounted DVD; dvd unmount = DVD drive
firewire mount = mounted FireWire drive; firewire unmount = FireWire drive; 3floppy mount = mounted floppy disk
3floppy unmount = floppy disk; 5floppy mount = mounted large floppy disk; 5floppy unmount = large floppy disk
usbfloppy mount = mounted USB floppy disk; linux hdd mount = mounted Linux hard disk
linux hdd unmount = Linux hard disk; hdd mac mount = mounted Mac hard disk; hdd mac unmount = Mac hard disk
hdd mount = mounted hard disk; hdd unmount = hard disk; hdd win mount = mounted Windows hard disk
hdd win unmount = Windows hard disk; mo mount = mounted magneto-optical disk; mo unmount = magneto-optical disk
usb mount = mounted USB stick; usb unmount = USB stick; nfs mount = mounted network drive; nfs unmount = network drive
zip mount = mounted zip disk; zip unmount = zip disk; zip external mount = mounted external zip drive
zip external unmount = external zip drive; camera mount = connected camera; camera unmount = disconnected camera
blockdevice = block device; chardevice = character device; ksim cpu = processor; kxkb = keyboard layout
print class = group of printers; pda black = black PDA; pda blue = blue PDA; mycomp = my computer
mycomputer = my computer; www = world wide web; folder txt = text folder; folder html = web folder
folder synch = synchronize folder; folder tar = archive folder; folder exec = programs folder
folder cool = cool folder; lockoverlay = lock; trashcan empty = empty trash can; trashcan full = full trash can
text document = text document; cdimage = CD image; cdtrack = CD audio track; colorscm = colour profile
deb = Debian package; rpm = RPM package; doc = text document; doc authors = list of authors
vectorgfx = vector graphics; wordprocessing = word processing document; xcf = GIMP image; txt = text file
tgz = compressed archive; tar = tar archive; tex = TeX document; source c = C source code
source cpp = C++ source code; source h = C header file; source java = Java source code; source l = lexer source code
source moc = meta object source code; source o = object code; source = source code; shellscript = shell script
png = PNG image; jpg = JPEG image; pdf = PDF document; html = HTML document; info = information file
real doc = RealMedia document; real = RealMedia file; mime dff = unknown file type; mime empty = empty file type
mime install = installer file; mime soffice = office document; mime sound = sound file; kmultiple = several files
kspreadsheet = spreadsheet; kpresenter = presentation; font truetype = TrueType font; font bitmap = bitmap font
core = core dump file; log = log file; make = makefile; java = Java; home = home folder; pinkhome = pink house
looknfeel = look and feel; minitower = mini tower computer; fileshare = file sharing; harddrive = hard drive
laptop battery = laptop battery; access = accessibility; acroread = Acrobat Reader; ooo = OpenOffice
ooo calc = OpenOffice Calc; ooo draw = OpenOffice Draw; ooo impress = OpenOffice Impress; ooo math = OpenOffice Math
ooo writer = OpenOffice Writer; ooo web = OpenOffice Web; ooo setup = OpenOffice setup
ooo template = OpenOffice template; ooo printeradmin = OpenOffice printer administration; ooo gulls = OpenOffice gulls
printeradmin = printer administration; soffice = StarOffice; soundcard = sound card; ntp-client = time server client
winprops = window properties; im-yahoo = Yahoo messenger; hw unknown = unknown hardware
edu science = science education; edu miscellaneous = miscellaneous education; userinfo = user information
filetypes = file types; isp-disabled = disconnected internet provider; isp = internet provider
isdn-config = ISDN setup; multihead = multiple monitors; knotes = sticky notes; klipper = clipboard tool
kalarm = alarm clock; korgac = calendar alarm; help index = help; kfm home = home; kpackage = package manager
kcontrol = control centre; konsole = terminal; xeyes = eyes; xmag = screen magnifier; ksnapshot = screenshot tool
kmoon = moon phase; kweather = weather; kteatime = tea timer; kstars = stars and planets; kpager = desktop pager
kmix = sound mixer; kget = download manager; kedit = text editor; kwrite = text editor; xedit = text editor
kview = image viewer; kuickshow = image viewer; kpaint = paint program; kcalc = calculator; kpoker = poker game
kmines = mine sweeper game; ksnake = snake game; kbattleship = battleship game; kbackgammon = backgammon game
kgoldrunner = gold runner game; khangman = hangman game; ksokoban = Sokoban game; kasteroids = asteroids game
kspaceduel = space duel game; kreversi = Reversi game; kjumpingcube = jumping cube game; kshisen = mahjong tile game
kblackbox = black box game; ksmiletris = smiley Tetris game; klaptopdaemon = laptop power; kprintfax = fax printing
kaddressbook = address book; kdict = dictionary; keditbookmarks = bookmark editor; kmenuedit = menu editor
khexedit = hex editor; kiconedit = icon editor; kruler = screen ruler; kpercentage = percentage exercises
ktimemon = system load monitor; ksysguard = system guard; kmouth = speaking mouth; kwallet = wallet
kghostview = PostScript viewer; kfloppy = floppy formatter; kcmscsi = SCSI settings; kcmpartitions = disk partitions
kcmmidi = MIDI settings; kcmsystem = system settings; kdisknav = disk navigator; kcmdrkonqi = crash handler
kmessedwords = scrambled words game; kbruch = fractions exercise; krecipes = recipes; kplot = function plotter
kmplot = function plotter; kalzium = periodic table of elements; kbear = bear; kpersonalizer = desktop personalizer
kthememgr = theme manager; gnome-fs-regular = plain file; gnome-fs-trash-empty = empty trash can
gnome-fs-trash-full = full trash can; gnome-fs-web = web; gnome-fs-home = home folder; gnome-fs-directory = folder
gnome-fs-directory-accept = accepting folder; gnome-fs-directory-visiting = open folder; gnome-fs-network = network
gnome-fs-client = client computer; gnome-dev-cdrom = CD-ROM drive; gnome-dev-harddisk = hard disk
gnome-compressed = compressed file; gnome-help = help; gtk-stock-help = help; gnome-graphics = graphics
gnome-terminal = terminal; gnome-mime-application-pdf = PDF document
gnome-mime-application-vnd.ms-powerpoint = PowerPoint document; gnome-mime-application-x-deb = Debian package
gnome-mime-application-x-rpm = RPM package; gnome-mime-application-x-svg = SVG drawing
gnome-mime-application-x-tar = tar archive; gnome-mime-audio-x-ogg = Ogg audio file; gnome-mime-audio = audio file
gnome-mime-document = document; gnome-mime-image-x-gif = GIF image; gnome-mime-image-x-svg = SVG image
gnome-mime-image-x-xcf = GIMP image; gnome-mime-image = image; gnome-mime-spreadsheet = spreadsheet
gnome-mime-text-html = HTML file; gnome-mime-text-x-authors = list of authors
gnome-mime-text-x-copying = licence text; gnome-mime-text-x-java = Java source code
gnome-mime-text-x-troff-man = manual page; gnome-mime-text = text file; stock-bezier = Bezier curve
stock-brush = brush; stock-circle = circle; stock-spiral = spiral; stock-square = square; stock-star = star
stock dialog-info = information; procman = process manager; gthumb = image browser; 4wd = off-road car
b minus = minus button; b plus = plus button; b up = up button; b down = down button; bb back = back
bb bback = skip back; bb cd = CD; bb dsk = disk; bb dvd = DVD; bb fforward = fast forward; bb fldr = folder
bb fldr fav = favourites folder; bb fldr my = my folder; bb forward = forward; bb home = home; bb mail = mail
bb mail new = new mail; bb mov = movie; bb music = music; bb pckg = package; bb reload = reload; bb stop = stop
bb trsh = full trash can; bb trsh e = empty trash can; k3b = CD burner; ark = archive manager; x = X window system
clipart = clip art; bb txt = text file; bb usb = USB; bb wrld = world; bb pingu = penguin
""")
"""Names of icons -> what the icon stands for."""
